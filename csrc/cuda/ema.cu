// SPDX-License-Identifier: Apache-2.0
// ema_update_ for CUDA: one launch updates a whole list of tensors of mixed dtypes, with no host sync or allocation.
#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/chunks.h"
#include "cuda/driver.h"
#include "cuda/ema_kernel.h"

namespace sslkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
