// SPDX-License-Identifier: Apache-2.0
// Masks of sequences.
#include "cpu/masks.h"

namespace sslkernels {
namespace {

// A list where the samples are worked on; `values` outlives it.
Tensor numbers(const Tensor& seed, std::vector<i64>& values) {
  return torch::stable::from_blob(values.data(), {static_cast<i64>(values.size())}, {1}, seed.device(),
                                  ScalarType::Long);
}

}  // namespace
}  // namespace sslkernels

#include "common/masks_sequence.inl"

namespace sslkernels {

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) { register_sequence_masks(library); }

}  // namespace sslkernels
