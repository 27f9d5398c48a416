# SPDX-License-Identifier: Apache-2.0
"""Every primitive of the library, as a differentiable torch op."""

from sslkernels.ops.contrastive import (
    Exclude,
    l2_normalize,
    sampled_logsumexp,
    self_similarity_logsumexp,
    similarity_cross_entropy,
    similarity_logsumexp,
    similarity_softplus,
    similarity_softplus_sum,
    two_view_cross_entropy,
)
from sslkernels.ops.ema import ema_update_, enqueue_
from sslkernels.ops.regression import average_layers, masked_regression

__all__ = [
    "Exclude",
    "average_layers",
    "ema_update_",
    "enqueue_",
    "l2_normalize",
    "masked_regression",
    "sampled_logsumexp",
    "self_similarity_logsumexp",
    "similarity_cross_entropy",
    "similarity_logsumexp",
    "similarity_softplus",
    "similarity_softplus_sum",
    "two_view_cross_entropy",
]
