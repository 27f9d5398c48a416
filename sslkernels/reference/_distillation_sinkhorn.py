# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp in plain PyTorch, on potentials: the definition, on any device, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.reference._precision import compute_dtype


@torch.no_grad()
def sinkhorn_center(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """See `sslkernels.ops.sinkhorn_center`."""
    x = scores.to(compute_dtype(scores))
    highest = x.amax(-2)
    center = highest + epsilon * ((x - highest.unsqueeze(-2)) / epsilon).logsumexp(-2)
    for _ in range(iterations - 1):
        # a prototype's share of the samples is at least 1 / K, since its column of exp((x - c) / eps) sums to one
        share = ((x - center.unsqueeze(-2)) / epsilon).softmax(-1).sum(-2)
        center = center + epsilon * share.log()
    return center


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """See `sslkernels.ops.sinkhorn_knopp`."""
    center = sinkhorn_center(scores, iterations, epsilon)
    return ((scores.to(center.dtype) - center.unsqueeze(-2)) / epsilon).softmax(-1)
