// SPDX-License-Identifier: Apache-2.0
// Masks of sequences.
#include "cuda/masks.h"

namespace sslkernels {
namespace {

constexpr int kListed = 128;

struct Numbers {
  int64_t values[kListed];
};

__global__ void __launch_bounds__(kListed)
    numbers_kernel(const __grid_constant__ Numbers list, int count, int64_t* out) {
  if (static_cast<int>(threadIdx.x) < count)
    out[threadIdx.x] = list.values[threadIdx.x];
}

// A list where the samples are worked on: it travels as a kernel's parameter, so that no copy waits.
Tensor numbers(const Tensor& seed, const std::vector<int64_t>& values) {
  const Device device(seed);
  const int64_t size = static_cast<int64_t>(values.size());
  const Tensor out = empty_like(seed, {size}, ScalarType::Long);
  for (int64_t first = 0; first < size; first += kListed) {
    const int64_t count = std::min<int64_t>(size - first, kListed);
    Numbers list{};
    std::copy_n(values.begin() + first, count, list.values);
    device.launch(&numbers_kernel, 1, kListed, 0, list, static_cast<int>(count),
                  static_cast<int64_t*>(out.mutable_data_ptr()) + first);
  }
  return out;
}

}  // namespace
}  // namespace sslkernels

#include "common/masks_sequence.inl"

SSLKERNELS_CUDA_OPS(library) { sslkernels::register_sequence_masks(library); }
