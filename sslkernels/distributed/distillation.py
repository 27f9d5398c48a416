# SPDX-License-Identifier: Apache-2.0
"""Centres of a teacher whose rows are on several ranks; each is the same, to the bit, on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.distributed._group import Batch
from sslkernels.ops import distillation as ops


@torch.no_grad()
def sinkhorn_centers(batch: Batch, views: Sequence[Tensor], iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """`ops.sinkhorn_center` of the rows of all ranks, (T, K), for T views (B, K) that are each on their own.

    A rank may have any number of rows of each view, also none. An iteration exchanges K numbers a view, whatever the
    number of ranks, and the first one twice: its sums have any size and are added relative to the largest.
    """
    if batch.local:
        found = [ops.sinkhorn_center(x, iterations, epsilon) for x in views]
        return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)
    check.integer("iterations", iterations, 1)
    sums = torch.stack([ops.sinkhorn_sweep(x, None, epsilon) for x in views])
    top = batch.max(sums)
    top = top.where(top != -torch.inf, 0.0)  # a prototype without a score anywhere
    counts = torch.stack([x.new_full((1,), x.shape[0], dtype=sums.dtype) for x in views])
    added = batch.sum(torch.cat([((sums - top) / epsilon).exp(), counts], 1))
    balance = epsilon * (sums.shape[1] / added[:, -1:]).log()
    center = top + epsilon * added[:, :-1].log() + balance
    for _ in range(iterations - 1):
        sums = torch.stack([ops.sinkhorn_sweep(x, c, epsilon) for x, c in zip(views, center)])
        center = center + epsilon * batch.sum((sums / epsilon).exp()).log() + balance
    return center


@torch.no_grad()
def mean_logits(batch: Batch, mean: Tensor, rows: int, otherwise: Tensor | None = None) -> Tensor:
    """The mean (V,) over the teacher's rows of all ranks, from that over the own ones.

    A rank without rows, whose mean is NaN, takes part; where nobody has any it is `otherwise`.
    """
    if batch.local:
        return mean if rows or otherwise is None else otherwise.reshape(-1)
    own = mean * rows if rows else torch.zeros_like(mean)
    added = batch.sum(torch.cat([own, own.new_full((1,), rows)]))
    mean, total = added[:-1] / added[-1], added[-1]
    return mean if otherwise is None else mean.where(total > 0, otherwise.reshape(-1).to(mean.dtype))
