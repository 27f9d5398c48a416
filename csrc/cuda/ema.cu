// SPDX-License-Identifier: Apache-2.0
// ema_update_ for CUDA: one launch updates a whole list of tensors of mixed dtypes, with no host sync or allocation.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/chunks.h"
#include "common/philox.h"
#include "common/rounding.h"
#include "cuda/driver.h"

namespace sslkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWidth = 4;                                                // elements of one vector load
constexpr int kUnroll = static_cast<int>(kChunk) / (kThreads * kWidth);  // loads in flight of one thread

// Integers and bools are copied: only the size of an element matters then.
enum class Type : uint8_t { float32, float64, bfloat16, float16, bytes1, bytes2, bytes4, bytes8 };

// The whole list travels as a kernel parameter: at most 4 KiB for the usual list, 32,764 bytes at most.
template <int capacity>
struct Table {
  void* target[capacity];
  const void* source[capacity];
  int64_t numel[capacity];
  uint32_t first_block[capacity];
  Type target_type[capacity];
  Type source_type[capacity];
  int count;
  uint32_t first_stream;  // of the random words of the first tensor
};

constexpr int kSmall = 128;
constexpr int kLarge = 1024;

struct Momentum {
  const void* pointer;  // null: `value` holds
  bool is_double;
  double value;
};

// Of stochastic rounding: a null seed rounds to nearest.
struct Random {
  const uint64_t* seed;
  uint32_t stream;
};

static_assert(sizeof(Table<kSmall>) + sizeof(Momentum) + sizeof(Random) <= 4096,
              "4 KiB of parameters suit every driver");
static_assert(sizeof(Table<kLarge>) + sizeof(Momentum) + sizeof(Random) <= 32764, "the limit of CUDA 12.1 and later");

template <typename T>
struct alignas(kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) Vector {
  T values[kWidth];
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// By way of float32, as torch converts float64 to 16 bits.
template <typename T, typename Real>
__device__ inline T narrow(Real x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <typename T>
constexpr bool kRounded = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;

template <typename T>
__device__ inline T narrow(float x, uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __ushort_as_bfloat16(round_bfloat16(x, word));
  } else {
    return __ushort_as_half(round_float16(x, word));
  }
}

// base + factor * difference, never fused: stochastic rounding has the same bits as on the CPU.
__device__ inline float add_product(float base, float factor, float difference) {
  return __fadd_rn(base, __fmul_rn(factor, difference));
}
__device__ inline double add_product(double base, double factor, double difference) {
  return __dadd_rn(base, __dmul_rn(factor, difference));
}

// target + (1 - momentum) (source - target), from the nearer end as torch.lerp does it, so that both ends are exact.
template <typename Real>
__device__ inline Real between(Real target, Real source, Real momentum, Real weight) {
  const bool near = weight < Real(0.5);
  return add_product(near ? target : source, near ? weight : -momentum, source - target);
}

// One block updates `count` <= kChunk elements from `begin` on.
template <typename T, typename S>
__device__ void update(T* target, const S* __restrict__ source, int64_t begin, int count, double momentum_,
                       Random random) {
  using Real = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<S, double>, double, float>;
  const Real momentum = static_cast<Real>(momentum_), weight = static_cast<Real>(1.0 - momentum_);
  const auto lerp = [&](T a, S b) { return between<Real>(widen(a), widen(b), momentum, weight); };
  const auto words = [&](int64_t element) { return philox(*random.seed, random.stream, element / 4); };
  static_assert(kWidth == 4, "a vector takes the four words of one Philox block");
  target += begin;
  source += begin;
  const bool aligned = reinterpret_cast<uintptr_t>(target) % alignof(Vector<T>) == 0 &&
                       reinterpret_cast<uintptr_t>(source) % alignof(Vector<S>) == 0;
  if (aligned && count == kChunk) {
    auto* targets = reinterpret_cast<Vector<T>*>(target);
    const auto* sources = reinterpret_cast<const Vector<S>*>(source);
    Vector<T> a[kUnroll];
    Vector<S> b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      a[u] = targets[u * kThreads + threadIdx.x];
      b[u] = sources[u * kThreads + threadIdx.x];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int vector = u * kThreads + threadIdx.x;
      if constexpr (kRounded<T>) {
        if (random.seed) {
          const Philox drawn = words(begin + vector * kWidth);
#pragma unroll
          for (int w = 0; w < kWidth; ++w) {
            a[u].values[w] = narrow<T>(static_cast<float>(lerp(a[u].values[w], b[u].values[w])), drawn.words[w]);
          }
          targets[vector] = a[u];
          continue;
        }
      }
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        a[u].values[w] = narrow<T, Real>(lerp(a[u].values[w], b[u].values[w]));
      }
      targets[vector] = a[u];
    }
  } else {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if constexpr (kRounded<T>) {
        if (random.seed) {
          const Philox drawn = words(begin + i);
          target[i] = narrow<T>(static_cast<float>(lerp(target[i], source[i])), drawn.words[(begin + i) % 4]);
          continue;
        }
      }
      target[i] = narrow<T, Real>(lerp(target[i], source[i]));
    }
  }
}

template <typename T>
__device__ void update_from(T* target, const void* source, Type source_type, int64_t begin, int count, double momentum,
                            Random random) {
  switch (source_type) {
    case Type::float32:
      return update(target, static_cast<const float*>(source), begin, count, momentum, random);
    case Type::float64:
      return update(target, static_cast<const double*>(source), begin, count, momentum, random);
    case Type::bfloat16:
      return update(target, static_cast<const __nv_bfloat16*>(source), begin, count, momentum, random);
    case Type::float16:
      return update(target, static_cast<const __half*>(source), begin, count, momentum, random);
    default:
      return;  // check_pair let no integer come with a floating target
  }
}

template <typename T>
__device__ void copy_from(void* target, const void* source, int64_t begin, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    static_cast<T*>(target)[begin + i] = static_cast<const T*>(source)[begin + i];
  }
}

template <int capacity>
__global__ void __launch_bounds__(kThreads)
    ema_kernel(const __grid_constant__ Table<capacity> table, Momentum given, const uint64_t* seed) {
  double momentum = given.value;
  if (given.pointer) {
    momentum = given.is_double ? *static_cast<const double*>(given.pointer) : *static_cast<const float*>(given.pointer);
  }
  if (!(momentum >= 0.0 && momentum <= 1.0)) {
    return;  // the host cannot see a tensor's value without a sync: an invalid one writes nothing
  }
  const int i = find_tensor(table.first_block, table.count, blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[i]) * kChunk;
  const int64_t left = table.numel[i] - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  void* target = table.target[i];
  const void* source = table.source[i];
  const Type type = table.source_type[i];
  const Random random{seed, table.first_stream + static_cast<uint32_t>(i)};
  switch (table.target_type[i]) {
    case Type::float32:
      return update_from(static_cast<float*>(target), source, type, begin, count, momentum, random);
    case Type::float64:
      return update_from(static_cast<double*>(target), source, type, begin, count, momentum, random);
    case Type::bfloat16:
      return update_from(static_cast<__nv_bfloat16*>(target), source, type, begin, count, momentum, random);
    case Type::float16:
      return update_from(static_cast<__half*>(target), source, type, begin, count, momentum, random);
    case Type::bytes1:
      return copy_from<uint8_t>(target, source, begin, count);
    case Type::bytes2:
      return copy_from<uint16_t>(target, source, begin, count);
    case Type::bytes4:
      return copy_from<uint32_t>(target, source, begin, count);
    case Type::bytes8:
      return copy_from<uint64_t>(target, source, begin, count);
  }
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Double:
      return Type::float64;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return Type::bytes1;
    case ScalarType::Short:
      return Type::bytes2;
    case ScalarType::Int:
      return Type::bytes4;
    case ScalarType::Long:
      return Type::bytes8;
    default:
      STD_TORCH_CHECK(false, "ema_update_: tensors must be float32, float64, bfloat16, float16, integers or bools");
  }
}

std::vector<int64_t> listed(torch::headeronly::IntHeaderOnlyArrayRef values) { return {values.begin(), values.end()}; }

void check_pair(const Tensor& target, const Tensor& source, int64_t index, int32_t device) {
  const auto sizes = listed(target.sizes()), strides = listed(target.strides());
  STD_TORCH_CHECK(sizes == listed(source.sizes()), "ema_update_: sources[", index,
                  "] has another shape than its target");
  STD_TORCH_CHECK(is_dense(sizes, strides) && strides == listed(source.strides()), "ema_update_: targets[", index,
                  "] must be dense, and its source must have the same strides");
  const bool copied = std::max(type_of(target), type_of(source)) >= Type::bytes1;
  STD_TORCH_CHECK(!copied || target.scalar_type() == source.scalar_type(), "ema_update_: sources[", index,
                  "] must have the dtype of its target, for one of them is not floating");
  STD_TORCH_CHECK(target.is_cuda() && source.is_cuda() && target.get_device_index() == device &&
                      source.get_device_index() == device,
                  "ema_update_: all tensors must be on one CUDA device, the pair at ", index, " is not");
}

template <int capacity>
void launch(const Launch& part, const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
            const Momentum& momentum, const uint64_t* seed, cudaStream_t stream) {
  Table<capacity> table;
  int64_t block = 0;
  for (size_t i = part.begin; i < part.end; ++i) {
    const size_t row = i - part.begin;
    table.target[row] = targets[i].mutable_data_ptr();
    table.source[row] = sources[i].const_data_ptr();
    table.numel[row] = targets[i].numel();
    table.first_block[row] = static_cast<uint32_t>(block);
    table.target_type[row] = type_of(targets[i]);
    table.source_type[row] = type_of(sources[i]);
    block += blocks_for(targets[i].numel());
  }
  table.count = static_cast<int>(part.end - part.begin);
  table.first_stream = static_cast<uint32_t>(part.begin);
  ema_kernel<capacity><<<static_cast<unsigned>(part.blocks), kThreads, 0, stream>>>(table, momentum, seed);
  STD_CUDA_CHECK(cudaGetLastError());
}

void ema_update_(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                 const std::optional<Tensor>& momentum_tensor, double momentum_value,
                 const std::optional<Tensor>& seed_tensor) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "ema_update_: targets and sources differ in length");
  if (targets.empty()) {
    return;
  }
  const int32_t device = targets[0].get_device_index();
  const auto on_device = [&](const Tensor& x) { return x.is_cuda() && x.get_device_index() == device; };
  Momentum momentum{nullptr, false, momentum_value};
  if (momentum_tensor) {
    const auto type = momentum_tensor->scalar_type();
    STD_TORCH_CHECK(momentum_tensor->numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                    "ema_update_: momentum must be one float32 or float64 element");
    STD_TORCH_CHECK(on_device(*momentum_tensor), "ema_update_: momentum must be on the device of the targets");
    momentum = {momentum_tensor->const_data_ptr(), type == ScalarType::Double, 0.0};
  }
  const uint64_t* seed = nullptr;
  if (seed_tensor) {
    STD_TORCH_CHECK(
        seed_tensor->numel() == 1 && seed_tensor->scalar_type() == ScalarType::Long && on_device(*seed_tensor),
        "ema_update_: the seed must be one int64 element on the device of the targets");
    seed = static_cast<const uint64_t*>(seed_tensor->const_data_ptr());
  }
  std::vector<int64_t> numels;
  for (size_t i = 0; i < targets.size(); ++i) {
    check_pair(targets[i], sources[i], static_cast<int64_t>(i), device);
    numels.push_back(targets[i].numel());
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (const Launch& part : plan_launches(numels, kLarge)) {
    if (part.blocks == 0) {
      continue;
    }
    if (part.end - part.begin <= kSmall) {
      launch<kSmall>(part, targets, sources, momentum, seed, static_cast<cudaStream_t>(stream));
    } else {
      launch<kLarge>(part, targets, sources, momentum, seed, static_cast<cudaStream_t>(stream));
    }
  }
}

}  // namespace
}  // namespace sslkernels

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CUDA, library) {
  if (sslkernels::driver_serves()) {
    library.impl("ema_update_", TORCH_BOX(&sslkernels::ema_update_));
  }
}
