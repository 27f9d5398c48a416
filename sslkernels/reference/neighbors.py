# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours in plain PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise, under autocast too. Rows of the scores are computed a
block at a time, so that no N x M matrix is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.reference._precision import compute_dtype, full_precision

METRICS = ("l2", "dot", "cosine")
EPS = 1e-8  # of KoLeo
COSINE_EPS = 1e-12  # torch.nn.functional.normalize's
BLOCK = 1 << 22  # numbers of a block
SAMPLE = 31  # keys that the centre is taken from


@torch.no_grad()
def nearest(
    queries: Tensor, keys: Tensor | None = None, metric: str = "l2", exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """See `sslkernels.ops.nearest`."""
    values, indices = topk_similarity(queries, keys, 1, metric, exclude_self)
    return values[:, 0].contiguous(), indices[:, 0].contiguous()


@torch.no_grad()
def topk_similarity(
    queries: Tensor, keys: Tensor | None, k: int, metric: str = "dot", exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """See `sslkernels.ops.topk_similarity`."""
    keys = queries if keys is None else keys
    dtype = compute_dtype(queries, keys)
    q, x = queries.to(dtype), keys.to(dtype)
    parts = []
    with full_precision(queries):
        a, b, half = _prepare(q, x, metric)
        rows = max(1, BLOCK // max(1, len(x), k * x.shape[1] if metric == "l2" else 0))
        for first in range(0, len(q), rows):
            s = a[first : first + rows] @ b.T
            s = s if half is None else s - half
            if exclude_self:
                s = s.masked_fill(_diagonal(s, first), -torch.inf)
            parts.append(_best(s, q[first : first + rows], x, k, metric, exclude_self, first))
    if not parts:
        return q.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=q.device)
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])


def _prepare(q: Tensor, x: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and what to take off each key's dot product, such that the largest score is the best."""
    if metric == "cosine":
        return F.normalize(q, dim=1, eps=COSINE_EPS), F.normalize(x, dim=1, eps=COSINE_EPS), None
    if metric == "dot":
        return q, x, None
    middle = centre(x)
    (q, _), (x, half) = (_finite(t - middle) for t in (q, x))
    return q, x, half


def centre(x: Tensor) -> Tensor:
    """Where to count l2 from, (D): the median of a sample of keys, which one key far away does not move; the origin
    unless that is four times as far from the sample."""
    if not x.numel():
        return x.new_zeros(x.shape[1])
    sample = x[:: (len(x) + SAMPLE - 1) // SAMPLE]
    middle = _median(sample).nan_to_num(0.0, 0.0, 0.0)
    near, far = (_median(t.square().sum(1)) for t in (sample - middle, sample))
    return torch.where(4 * near <= far, middle, torch.zeros_like(middle))


def _median(x: Tensor) -> Tensor:
    """Along the first axis, of what is not NaN: the lower one. `nanmedian` has no deterministic form on CUDA."""
    last = (~x.isnan()).sum(0, keepdim=True) - 1
    return x.sort(dim=0).values.gather(0, last.clamp(min=0) // 2)[0]


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and half of their squared lengths; a row of infinite length lies at 0 and keeps that length."""
    half = x.square().sum(1) / 2
    return x.masked_fill((half == torch.inf)[:, None], 0.0), half


def _diagonal(s: Tensor, first: int) -> Tensor:
    """(rows, M) bool: row i of the block is query first + i, which is key first + i."""
    row, column = (torch.arange(size, device=s.device) for size in s.shape)
    return column == row[:, None] + first


def _best(
    s: Tensor, q: Tensor, x: Tensor, k: int, metric: str, exclude_self: bool, first: int
) -> tuple[Tensor, Tensor]:
    if k == 1:
        indices = s.argmax(dim=1, keepdim=True)  # of several the first, and NaN before any number
        if exclude_self:  # where all are -inf, what is excluded is the first of them
            own = torch.arange(first, first + len(s), device=s.device)[:, None]
            indices = torch.where(indices == own, (own == 0).to(indices.dtype), indices)
        values = s.gather(1, indices)
    else:
        values, indices = s.sort(dim=1, descending=True, stable=True)
        if exclude_self:  # -inf as well: it goes behind what has that score
            own = torch.arange(first, first + len(s), device=s.device)[:, None]
            order = (indices == own).to(torch.uint8).sort(dim=1, stable=True).indices
            values, indices = values.gather(1, order[:, :k]), indices.gather(1, order[:, :k])
        values, indices = values[:, :k], indices[:, :k]
    if metric != "l2":
        return values.contiguous(), indices.contiguous()
    indices = indices.sort(dim=1).values
    nearness = -(q[:, None] - x[indices]).square().sum(-1)
    nearness, order = nearness.sort(dim=1, descending=True, stable=True)
    return -nearness, indices.gather(1, order)


def koleo(x: Tensor, p: float = 2.0, eps: float = EPS) -> Tensor:
    """How close the rows of x (N, D) lie to each other: a regularizer that keeps a batch's features apart.

        u_i  = x_i / max(|x_i|, eps)
        n(i) = argmax over j != i of <u_i, u_j>                 no gradient
        loss = -mean_i log(|u_i - u_n(i) + eps|_p + eps)        eps is added to every component

    The gradient reaches u_i and its neighbour. In 16 bits eps would be zero and a pair of equal rows infinite, so that
    nothing here is; two equal rows cost -log(eps (sqrt(D) + 1)) each, 15.4 at D = 384. See
    `sslkernels.losses.koleo_loss` for what has no gradient.

    Source: Sablayrolles et al. 2019 (arXiv:1806.03198), facebookresearch/dinov2 `dinov2/loss/koleo_loss.py`.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x must be (N, D) with at least 2 rows, got {tuple(x.shape)}")
    x = x.to(compute_dtype(x))
    u = F.normalize(x, dim=1, eps=eps)
    neighbor = nearest(u.detach(), metric="dot", exclude_self=True)[1]
    other = u[neighbor]
    short = torch.linalg.vector_norm(x.detach(), dim=1) < eps
    constant = (u == other).all(1) | short | short[neighbor]
    distance = F.pairwise_distance(u, other, p, eps)
    return -(torch.where(constant, distance.detach(), distance) + eps).log().mean()
