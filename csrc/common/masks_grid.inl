// SPDX-License-Identifier: Apache-2.0
// The masks of grids as the dispatcher calls them, on any device: included where run_samples() says how to work there,
// and empty_like() makes tensors.
#include <tuple>
#include <vector>

#include "common/masks_grid.h"
#include "common/masks_tensors.h"

namespace sslkernels {
namespace {

using Ids = std::tuple<Tensor, Tensor>;

Ids random_mask(const Tensor& seed, int64_t batch, int64_t frames, int64_t places, int64_t keep) {
  const Tensor visible = empty_like(seed, {batch, frames * keep}, ScalarType::Long),
               masked = empty_like(seed, {batch, frames * (places - keep)}, ScalarType::Long);
  run_samples(seed, batch, RandomMask{seed_of(seed), frames, places, keep, ids_of(visible), ids_of(masked)});
  return {visible, masked};
}

Tensor block_mask(const Tensor& seed, int64_t batch, int64_t height, int64_t width, double low, double high,
                  double min_area, double max_area, double log_aspect_low, double log_aspect_high, int64_t attempts,
                  double probability, bool slices, bool whole) {
  const Tensor out = empty_like(seed, {batch, height, width}, ScalarType::Bool),
               ranks = empty_like(seed, {slices ? batch : 0}, ScalarType::Long);
  if (slices && batch > 0)
    run_samples(seed, 1, BatchOrder{seed_of(seed), batch, ids_of(ranks)});
  run_samples(
      seed, batch,
      BlockMask{seed_of(seed), batch, height, width, low, high, min_area, max_area, log_aspect_low, log_aspect_high,
                attempts, probability, whole, slices ? ids_of(ranks) : nullptr, flags_of(out)});
  return out;
}

Ids inverse_block_mask(const Tensor& seed, int64_t batch, int64_t height, int64_t width, int64_t blocks,
                       int64_t block_size, int64_t keep) {
  const Tensor visible = empty_like(seed, {batch, keep}, ScalarType::Long),
               masked = empty_like(seed, {batch, height * width - keep}, ScalarType::Long);
  run_samples(
      seed, batch,
      InverseBlockMask{seed_of(seed), height, width, blocks, block_size, keep, ids_of(visible), ids_of(masked)});
  return {visible, masked};
}

template <typename Library>
void register_grid_masks(Library& library) {
  library.impl("random_mask", TORCH_BOX(&random_mask));
  library.impl("block_mask", TORCH_BOX(&block_mask));
  library.impl("inverse_block_mask", TORCH_BOX(&inverse_block_mask));
}

}  // namespace
}  // namespace sslkernels
