// SPDX-License-Identifier: Apache-2.0
// Masks of patch grids with counts known beforehand.
#include "cuda/masks.h"

#include "common/masks_grid.inl"

SSLKERNELS_CUDA_OPS(library) { sslkernels::register_grid_masks(library); }
