# SPDX-License-Identifier: Apache-2.0
"""Every pair's score in float64, and what the best of them have to satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("l2", "dot", "cosine")


def exact_scores(queries: Tensor, keys: Tensor, metric: str) -> Tensor:
    """(N, M): the larger the nearer."""
    q, k = queries.double(), keys.double()
    if metric == "l2":
        return -torch.stack([(row - k).square().sum(1) for row in q]) if len(q) else q.new_empty(0, len(k))
    if metric == "cosine":
        q, k = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (q, k))
    return q @ k.T


def assert_best(
    result: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor | None, metric: str, exclude_self: bool = False
) -> None:
    """Values and order within the rounding of one product of D terms: |error| <= D eps |q| |k|, at most.

    The choice by l2 compares <q, k> - |k|^2 / 2, twice; its values come from the differences.
    """
    values, indices = result
    if values.ndim == 1:
        values, indices = values[:, None], indices[:, None]
    other = queries if keys is None else keys
    dtype = torch.float64 if torch.float64 in (queries.dtype, other.dtype) else torch.float32
    assert values.dtype == dtype and indices.dtype == torch.int64
    scores = exact_scores(queries, other, metric)
    if exclude_self:
        scores.fill_diagonal_(-torch.inf)
        assert not (indices == torch.arange(len(queries))[:, None]).any()
    assert (indices.sort(1).values.diff(dim=1) > 0).all()  # no key twice
    found = scores.gather(1, indices)
    eps = max(torch.finfo(dtype).eps, 1e-15) * (4 + other.shape[1])
    q, k = (x.double().norm(dim=1) for x in (queries, other))
    rounding = eps * ((q + k.max()).square()[:, None] if metric == "l2" else q[:, None] * k.max())
    if metric == "cosine":
        rounding = torch.full_like(q, eps)[:, None]
    best = scores.topk(indices.shape[1], dim=1).values
    assert ((best - found).abs() <= 2 * rounding).all()
    sign = -1 if metric == "l2" else 1
    near = eps * found.abs() if metric == "l2" else rounding
    assert ((sign * values.double() - found).abs() <= near).all()
    assert (sign * values.diff(dim=1) <= 0).all()
