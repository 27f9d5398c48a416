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
    uniform = x.shape[-2] / x.shape[-1]
    highest = x.amax(-2)
    usage = ((x - highest.unsqueeze(-2)) / epsilon).exp().sum(-2) / uniform
    center = highest + epsilon * usage.log()
    for _ in range(iterations - 1):
        # each column of exp((x - c) / eps) has the sum B / K, so that no usage vanishes: it is at least 1 / K
        usage = ((x - center.unsqueeze(-2)) / epsilon).softmax(-1).sum(-2) / uniform
        center = center + epsilon * usage.log()
    return center


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """See `sslkernels.ops.sinkhorn_knopp`."""
    center = sinkhorn_center(scores, iterations, epsilon)
    return ((scores.to(center.dtype) - center.unsqueeze(-2)) / epsilon).softmax(-1)
