# SPDX-License-Identifier: Apache-2.0
"""Every primitive of the library, as a differentiable torch op."""

from sslkernels.ops.contrastive import (
    Exclude,
    distractor_counts,
    l2_normalize,
    sampled_logsumexp,
    self_similarity_logsumexp,
    similarity_cross_entropy,
    similarity_logsumexp,
    similarity_softplus,
    similarity_softplus_sum,
    two_view_cross_entropy,
)
from sslkernels.ops.correlation import (
    product_frobenius,
    standardize,
    two_view_correlation,
    two_view_covariance,
)
from sslkernels.ops.distillation import (
    linear_soft_cross_entropy,
    sinkhorn_center,
    sinkhorn_knopp,
    sinkhorn_sweep,
    soft_cross_entropy,
    softmax_center,
)
from sslkernels.ops.ema import ema_update_, enqueue_
from sslkernels.ops.masks import (
    block_mask,
    inverse_block_mask,
    multiblock3d_mask,
    multiblock_mask,
    random_mask,
    span_corruption,
    span_mask,
    token_mask,
    tube_mask,
)
from sslkernels.ops.neighbors import nearest, topk_similarity
from sslkernels.ops.patches import (
    embed_patches,
    gather_patches,
    gather_tokens,
    masked_patch_loss,
    permute_patches,
    restore_tokens,
)
from sslkernels.ops.regression import average_layers, masked_regression
from sslkernels.ops.tokens import AliasTable, alias_table, linear_cross_entropy, skipgram, skipgram_update_

__all__ = [
    "AliasTable",
    "Exclude",
    "alias_table",
    "average_layers",
    "block_mask",
    "distractor_counts",
    "ema_update_",
    "embed_patches",
    "enqueue_",
    "gather_patches",
    "gather_tokens",
    "inverse_block_mask",
    "l2_normalize",
    "linear_cross_entropy",
    "linear_soft_cross_entropy",
    "masked_patch_loss",
    "masked_regression",
    "multiblock3d_mask",
    "multiblock_mask",
    "nearest",
    "permute_patches",
    "product_frobenius",
    "random_mask",
    "restore_tokens",
    "sampled_logsumexp",
    "self_similarity_logsumexp",
    "similarity_cross_entropy",
    "similarity_logsumexp",
    "similarity_softplus",
    "similarity_softplus_sum",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "sinkhorn_sweep",
    "skipgram",
    "skipgram_update_",
    "soft_cross_entropy",
    "softmax_center",
    "span_corruption",
    "span_mask",
    "standardize",
    "token_mask",
    "topk_similarity",
    "tube_mask",
    "two_view_correlation",
    "two_view_covariance",
    "two_view_cross_entropy",
]
