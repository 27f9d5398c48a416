# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: cross-entropy with a teacher's probabilities, centring and Sinkhorn-Knopp."""

from sslkernels.ops._distillation_linear import linear_soft_cross_entropy
from sslkernels.ops._distillation_sinkhorn import sinkhorn_center, sinkhorn_knopp, sinkhorn_sweep
from sslkernels.ops._distillation_soft import soft_cross_entropy, softmax_center

__all__ = [
    "linear_soft_cross_entropy",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "sinkhorn_sweep",
    "soft_cross_entropy",
    "softmax_center",
]
