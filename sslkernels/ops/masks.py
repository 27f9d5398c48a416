# SPDX-License-Identifier: Apache-2.0
"""Masks: which patches, frames or tokens a model does not see.

True, or `masked`, means hidden from the encoder. Functions with fixed counts return ids, the others a bool mask.
"""

from sslkernels.ops._masks_grid import block_mask, inverse_block_mask, random_mask, tube_mask
from sslkernels.ops._masks_multiblock import multiblock3d_mask, multiblock_mask
from sslkernels.ops._masks_span import span_mask
from sslkernels.ops._masks_token import span_corruption, token_mask

__all__ = [
    "block_mask",
    "inverse_block_mask",
    "multiblock3d_mask",
    "multiblock_mask",
    "random_mask",
    "span_corruption",
    "span_mask",
    "token_mask",
    "tube_mask",
]
