# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp in plain PyTorch, on potentials: the definition, on any device, in any floating dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkernels.reference._precision import compute_dtype


@torch.no_grad()
def sinkhorn_center(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """See `sslkernels.ops.sinkhorn_center`."""
    balance = epsilon * math.log(scores.shape[-1] / scores.shape[-2])
    center = sinkhorn_sweep(scores, None, epsilon) + balance
    for _ in range(iterations - 1):
        # each column of exp((x - c) / eps) has the sum B / K, so that no sum vanishes: it is at least 1 / K
        center = center + sinkhorn_sweep(scores, center, epsilon) + balance
    return center


@torch.no_grad()
def sinkhorn_sweep(scores: Tensor, center: Tensor | None = None, epsilon: float = 0.05) -> Tensor:
    """See `sslkernels.ops.sinkhorn_sweep`."""
    x = scores.to(compute_dtype(scores))
    if x.shape[-2] == 0:
        return x.new_full((*x.shape[:-2], x.shape[-1]), -torch.inf)
    if center is None:
        highest = x.amax(-2, keepdim=True)
        origin = highest.where(highest != -torch.inf, 0.0)  # nothing at all is -inf, while +inf is NaN
        return origin.squeeze(-2) + epsilon * ((x - origin) / epsilon).exp().sum(-2).log()
    return epsilon * ((x - center.unsqueeze(-2)) / epsilon).softmax(-1).sum(-2).log()


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """See `sslkernels.ops.sinkhorn_knopp`."""
    center = sinkhorn_center(scores, iterations, epsilon)
    return ((scores.to(center.dtype) - center.unsqueeze(-2)) / epsilon).softmax(-1)
