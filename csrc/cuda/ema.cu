// SPDX-License-Identifier: Apache-2.0
// ema_update_ for CUDA: one launch updates a whole list of tensors of mixed dtypes, with no host sync or allocation.
#include <algorithm>
#include <vector>

#include "common/chunks.h"
#include "cuda/ema_kernel.h"
#include "cuda/launch.h"

namespace sslkernels {
namespace {

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

void check_pair(const Tensor& target, const Tensor& source, int64_t index) {
  const auto sizes = listed(target.sizes()), strides = listed(target.strides());
  STD_TORCH_CHECK(sizes == listed(source.sizes()), "ema_update_: sources[", index,
                  "] has another shape than its target");
  STD_TORCH_CHECK(is_dense(sizes, strides) && strides == listed(source.strides()), "ema_update_: targets[", index,
                  "] must be dense, and its source must have the same strides");
  const bool copied = std::max(type_of(target), type_of(source)) >= Type::bytes1;
  STD_TORCH_CHECK(!copied || target.scalar_type() == source.scalar_type(), "ema_update_: sources[", index,
                  "] must have the dtype of its target, for one of them is not floating");
}

template <int capacity>
void launch(const Launch& part, const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
            const Momentum& momentum, const uint64_t* seed, const Device& device) {
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
  device.launch(&ema_kernel<capacity>, static_cast<unsigned>(part.blocks), kThreads, 0, table, momentum, seed);
}

void ema_update_(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                 const Optional& momentum_tensor, double momentum_value, const Optional& seed_tensor) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "ema_update_: targets and sources differ in length");
  if (targets.empty()) {
    return;
  }
  Momentum momentum{nullptr, false, momentum_value};
  if (momentum_tensor) {
    const auto type = momentum_tensor->scalar_type();
    STD_TORCH_CHECK(momentum_tensor->numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                    "ema_update_: momentum must be one float32 or float64 element");
    check_device("ema_update_: momentum", *momentum_tensor, targets[0]);
    momentum = {momentum_tensor->const_data_ptr(), type == ScalarType::Double, 0.0};
  }
  const uint64_t* seed = nullptr;
  if (seed_tensor) {
    STD_TORCH_CHECK(seed_tensor->numel() == 1 && seed_tensor->scalar_type() == ScalarType::Long,
                    "ema_update_: the seed must be one int64 element");
    check_device("ema_update_: the seed", *seed_tensor, targets[0]);
    seed = static_cast<const uint64_t*>(seed_tensor->const_data_ptr());
  }
  std::vector<int64_t> numels;
  for (size_t i = 0; i < targets.size(); ++i) {
    check_pair(targets[i], sources[i], static_cast<int64_t>(i));
    check_device("ema_update_: each target", targets[i], targets[0]);
    check_device("ema_update_: each source", sources[i], targets[0]);
    numels.push_back(targets[i].numel());
  }
  const Device device(targets[0]);
  for (const Launch& part : plan_launches(numels, kLarge)) {
    if (part.end - part.begin <= kSmall) {
      launch<kSmall>(part, targets, sources, momentum, seed, device);
    } else {
      launch<kLarge>(part, targets, sources, momentum, seed, device);
    }
  }
}

}  // namespace
}  // namespace sslkernels

SSLKERNELS_CUDA_OPS(library) { library.impl("ema_update_", TORCH_BOX(&sslkernels::ema_update_)); }
