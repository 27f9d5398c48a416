# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours: the best key, or the k best keys, of each query; the N x M scores are never stored.

Rows may be float32, float64, bfloat16 or float16, mixed and strided; arithmetic is float32 (float64 if any is float64),
under autocast too. Neither op has a gradient: gather the rows and compute the value again for one. Equal scores go to
the smaller index. Definitions in plain PyTorch: `sslkernels.reference.neighbors`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops._registry import define, differentiable
from sslkernels.reference import neighbors as reference
from sslkernels.reference._precision import compute_dtype

__all__ = ["nearest", "topk_similarity"]


def nearest(
    queries: Tensor, keys: Tensor | None = None, *, metric: str = "l2", exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The key that is nearest to each query.

        value_i, index_i = min over j of |q_i - k_j|^2                   metric="l2"
                           max over j of <q_i, k_j>                      metric="dot"
                           max over j of <q_i, k_j> / (|q_i| |k_j|)      metric="cosine", lengths at least 1e-12

    The l2 choice is made by products, counted from the middle of the keys, so that an offset that all rows share costs
    no digit; its value is then computed from the difference of the two rows. Where two keys are equally near up to the
    rounding of <q, k> (about 1e-7 |q| |k|, lengths from the middle of the keys), either may be chosen.

    Args:
        queries: (N, D).
        keys: (M, D), M > 0; None: the queries themselves, at half the work on a CPU.
        exclude_self: leave out key i for query i; the queries are the keys, or their first N rows.

    Returns:
        values (N,), float32 (float64 if an input is); indices (N,), int64. No gradient. A NaN score wins, as in
        torch.max, and its value is NaN; an infinite distance loses.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; no key, or none but the query itself; another
            metric.

    Example:
        >>> codes, codebook = torch.randn(100, 16), torch.randn(32, 16)
        >>> distance, index = nearest(codes, codebook)
        >>> torch.allclose(distance, (codes - codebook[index]).square().sum(1))
        True
    """
    _check(queries, keys, metric, exclude_self)
    return _nearest(queries, keys, metric, exclude_self)


def topk_similarity(
    queries: Tensor, keys: Tensor | None, k: int, *, metric: str = "dot", exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of each query, best first.

        values_i, indices_i = the k largest over j of <q_i, k_j>                      metric="dot"
                              the k largest over j of <q_i, k_j> / (|q_i| |k_j|)      metric="cosine"
                              the k smallest over j of |q_i - k_j|^2                  metric="l2"

    Args:
        queries: (N, D).
        keys: (M, D), M > 0; None: the queries themselves.
        k: 1 to M, or to M - 1 with exclude_self.
        exclude_self: as in `nearest`.

    Returns:
        values (N, k), float32 (float64 if an input is), and indices (N, k), int64. No gradient. NaN and how exact the
        choice is: as in `nearest`.

    Raises:
        ValueError, TypeError: as in `nearest`; k out of range.

    Example:
        >>> features = torch.randn(100, 16)
        >>> similarity, neighbors = topk_similarity(features, None, 5, metric="cosine", exclude_self=True)
        >>> similarity.shape, neighbors.shape
        (torch.Size([100, 5]), torch.Size([100, 5]))
    """
    check.integer("k", k, 1)
    available = _check(queries, keys, metric, exclude_self)
    if k > available:
        raise ValueError(f"k must be at most the {available} keys of a query, got {k}")
    return _topk(queries, keys, k, metric, exclude_self)


def _check(queries: Any, keys: Any, metric: str, exclude_self: bool) -> int:
    """How many keys a query has."""
    check.features(queries=queries, **({} if keys is None else {"keys": keys}))
    check.choice("metric", metric, reference.METRICS)
    count = (queries if keys is None else keys).shape[0]
    if exclude_self and queries.shape[0] > count:
        raise ValueError(
            f"queries must be the first rows of keys ({count}) for exclude_self, got {queries.shape[0]} rows"
        )
    available = count - 1 if exclude_self else count
    if available < 1 and not (keys is None and count == 0):
        name, why = ("queries" if keys is None else "keys"), " beside the query itself" if exclude_self else ""
        raise ValueError(f"{name} must have at least one row{why}, got {count} row{'s' * (count != 1)}")
    return available


# schemas


def _fake(queries, keys, shape):
    dtype = compute_dtype(queries, queries if keys is None else keys)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


_nearest = define(
    "nearest(Tensor queries, Tensor? keys, str metric, bool exclude_self) -> (Tensor values, Tensor indices)",
    reference=reference.nearest,
    fake=lambda queries, keys, *rest: _fake(queries, keys, queries.shape[:1]),
)
_topk = define(
    "topk_similarity(Tensor queries, Tensor? keys, SymInt k, str metric, bool exclude_self)"
    " -> (Tensor values, Tensor indices)",
    reference=reference.topk_similarity,
    fake=lambda queries, keys, k, *rest: _fake(queries, keys, (queries.shape[0], k)),
)

for _op in (_nearest, _topk):
    differentiable(
        _op,
        setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
        backward=lambda ctx, *grads: (None,) * len(ctx.needs_input_grad),
    )
