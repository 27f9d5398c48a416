// SPDX-License-Identifier: Apache-2.0
// Masks of patch grids with counts known beforehand, and the words of all masks.
#include "cpu/masks.h"

#include "common/masks_grid.inl"

#define SSLKERNELS_LEAVES "cpu/masks.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

void random_words(uint64_t seed, uint64_t stream, uint64_t region, i64 blocks, uint32_t* out) {
  SSLKERNELS_AT_LEVEL(words(seed, stream, static_cast<uint32_t>(region), blocks, out));
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) { register_grid_masks(library); }

}  // namespace sslkernels
