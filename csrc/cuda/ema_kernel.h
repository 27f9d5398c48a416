// SPDX-License-Identifier: Apache-2.0
// The kernel of ema_update_.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/chunks.h"
#include "common/philox.h"
#include "common/rounding.h"
#include "cuda/scalars.h"

namespace sslkernels {

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
__device__ inline T narrow(float x, uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __ushort_as_bfloat16(round_bfloat16(x, word));
  } else {
    return __ushort_as_half(round_float16(x, word));
  }
}

// An index that is known at run time only would put the words on the stack.
__device__ inline uint32_t pick(const Philox& drawn, int64_t element) {
  const uint32_t even = element & 2 ? drawn.words[2] : drawn.words[0];
  const uint32_t odd = element & 2 ? drawn.words[3] : drawn.words[1];
  return element & 1 ? odd : even;
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
  const bool aligned = reinterpret_cast<uintptr_t>(target) % alignof(Vector<T, kWidth>) == 0 &&
                       reinterpret_cast<uintptr_t>(source) % alignof(Vector<S, kWidth>) == 0;
  if (aligned && count == kChunk) {
    auto* targets = reinterpret_cast<Vector<T, kWidth>*>(target);
    const auto* sources = reinterpret_cast<const Vector<S, kWidth>*>(source);
    Vector<T, kWidth> a[kUnroll];
    Vector<S, kWidth> b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      a[u] = targets[u * kThreads + threadIdx.x];
      b[u] = sources[u * kThreads + threadIdx.x];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int vector = u * kThreads + threadIdx.x;
      if constexpr (kNarrow<T>) {
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
      if constexpr (kNarrow<T>) {
        if (random.seed) {
          const uint32_t word = pick(words(begin + i), begin + i);
          target[i] = narrow<T>(static_cast<float>(lerp(target[i], source[i])), word);
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

}  // namespace sslkernels
