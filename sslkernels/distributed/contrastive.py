# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops over a batch that several ranks hold: the same arguments, and the `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels._autocast import cast_features
from sslkernels.distributed import _group_sums as sums_op
from sslkernels.distributed._attention import attention, shard_attention
from sslkernels.distributed._group import Batch
from sslkernels.distributed._logsumexp import logsumexp
from sslkernels.distributed._softplus import softplus, softplus_sum
from sslkernels.ops import contrastive as ops
from sslkernels.ops._emitted import wants_grad
from sslkernels.ops.contrastive import NOTHING, SELF, Exclude, _split, _weights


def similarity_logsumexp(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
    *,
    scales: Sequence[float] | None = None,
    columns: bool = True,
    return_positive: bool = False,
    return_max: bool = False,
) -> Any:
    """`ops.similarity_logsumexp` of the own queries with the keys of all ranks, and of the own keys with all queries.

    `exclude.diagonal` and `period` are places in the own rows: a sample and its partner are on one rank. Groups and
    masks are those of the own rows, and are compared with those of all ranks. Frozen keys are not kept for backward,
    which then exchanges nothing.
    """
    options: dict[str, Any] = {"columns": columns, "return_positive": return_positive, "return_max": return_max}
    if batch.local:
        return ops.similarity_logsumexp(q, k, scale, exclude, scales=scales, **options)
    q, k = cast_features(q, k)
    if ops.emits_gradient(wants_grad(q, k, scale), scales, columns, return_positive):
        row, top, _ = attention(q, k, *_split(scale), *exclude, *_way(batch, k))
        return (row, None, top) if return_max else (row, None)
    offset = exclude.diagonal if return_positive else None
    row, col, positive, top = _call(batch, q, k, scale, exclude, scales, columns, offset, half=False)
    out = (row, col if columns else None)
    return out + (positive,) * return_positive + (top,) * return_max


def self_similarity_logsumexp(
    batch: Batch,
    z: Tensor,
    scale: Tensor | float = 1.0,
    exclude: Exclude = SELF,
    *,
    scales: Sequence[float] | None = None,
    return_positive: bool = False,
    return_max: bool = False,
) -> Any:
    """`ops.self_similarity_logsumexp` of the rows of all ranks, for the own ones.

    Each pair of ranks meets once, which is half the work; with `return_max`, twice.
    """
    options: dict[str, Any] = {"scales": scales, "return_positive": return_positive, "return_max": return_max}
    if batch.local:
        return ops.self_similarity_logsumexp(z, scale, exclude, **options)
    (z,) = cast_features(z)
    offset = exclude.period if return_positive else None
    lse, _, positive, top = _call(batch, z, None, scale, exclude, scales, False, offset, half=not return_max)
    out = (lse,) + (positive,) * return_positive + (top,) * return_max
    return out if len(out) > 1 else lse


def sharded_logsumexp(
    batch: Batch, q: Tensor, shard: Tensor, scale: Tensor | float = 1.0, *, return_max: bool = False
) -> Any:
    """The rows of `similarity_logsumexp` over frozen keys of which each rank holds a shard: the queries travel.

    No part of the shards is kept for backward, which exchanges nothing.
    """
    q, shard = cast_features(q, shard)
    row, top, _ = shard_attention(q, shard, *_split(scale), *_way(batch, q))
    return (row, None, top) if return_max else (row, None)


def similarity_softplus(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    exclude: Exclude = NOTHING,
) -> Tensor:
    """`ops.similarity_softplus` of the own queries with the keys of all ranks; `exclude` as above."""
    if batch.local:
        return ops.similarity_softplus(q, k, scale, bias, exclude)
    q, k = cast_features(q, k)
    return softplus(q, k, *_split(scale), *_split(bias), *exclude, *_route(batch, k))[0]


def similarity_softplus_sum(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    *,
    weight: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
) -> Tensor:
    """`ops.similarity_softplus_sum` of the own queries with the keys of all ranks; backward exchanges nothing.

    The gradient of the own keys holds what other ranks' losses are to give, at one upstream gradient for all ranks.
    """
    if batch.local:
        return ops.similarity_softplus_sum(q, k, scale, bias, weight=weight, exclude=exclude)
    rows, number = _weights(weight, q.shape[0], q)
    q, k = cast_features(q, k)
    numbers = (rows, number, *_split(scale), *_split(bias))
    return softplus_sum(q, k, *numbers, *exclude, *_way(batch, k), wants_grad(q, k, scale, bias))[0]


def group_sums(batch: Batch, x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each own row the sum of all ranks' rows of its group, and how many they are; the own groups ascend.

    x: (N, D), groups: (N,) int64. Returns (N, D) and (N,), in float32 at least.
    """
    if not batch.local:
        return sums_op.group_sums(x, groups, *_way(batch, x))
    group = torch.zeros_like(groups)
    group[1:] = (groups[1:] != groups[:-1]).cumsum(0)
    sums = torch.zeros_like(x).index_add(0, group, x)  # (groups <= N, D)
    counts = x.new_zeros(len(x)).index_add(0, group, x.new_ones(len(x)))
    return sums.index_select(0, group), counts[group]


def _call(
    batch: Batch,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor | float,
    exclude: Exclude,
    scales: Sequence[float] | None,
    columns: bool,
    offset: int | None,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    multipliers = (1.0,) if scales is None else tuple(map(float, scales))
    options = (multipliers, columns, offset, half)
    route = _route(batch, q if k is None else k)
    row, col, positive, top, _ = logsumexp(q, k, *_split(scale), *exclude, *options, *route)
    if scales is None:
        row, col = row[0], col[0] if columns else col
    return row, col, positive, top


def _way(batch: Batch, travels: Tensor) -> tuple[Any, ...]:
    return batch.sizes_of(travels), batch.rank, batch.world, batch.strategy, batch.name


def _route(batch: Batch, travels: Tensor) -> tuple[Any, ...]:
    """With whether backward may take what "gather" brought: a compiler must know its size beforehand."""
    *way, name = _way(batch, travels)
    return *way, way[0] is None or not torch.compiler.is_compiling(), name
