# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exps over frozen keys of all ranks: the forward emits the gradient of the queries, and keeps no keys.

Either the keys travel and the parts of a softmax merge where the queries are, or, where each rank holds a shard of a
queue, the queries travel and what the shards found comes home. Backward exchanges nothing.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.distributed._collectives import row_counts
from sslkernels.distributed._logsumexp import _cargo
from sslkernels.distributed._trips import SUM, Fold, Route, trip
from sslkernels.ops import _contrastive as op
from sslkernels.ops._registry import define, differentiable

_WAY = "Tensor? sizes, SymInt rank, SymInt world, str strategy, str group"
_RESULT = "(Tensor row_lse, Tensor row_max, Tensor context)"


def _merge(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Two parts of one softmax, each its log-sum-exp (N,), its largest score (N,) and its mean of the keys (N, D)."""
    lse = torch.logaddexp(a[0], b[0])
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # without a pair
    context = torch.zeros_like(a[2])
    for part, _, mean in (a, b):
        # what has no pair may hold anything, and 0 * inf is NaN
        context += torch.exp(part - finite)[:, None] * mean.masked_fill((part == -torch.inf)[:, None], 0.0)
    return [lse, torch.maximum(a[1], b[1]), context]


PARTS = Fold(_merge, -torch.inf)


def _forward(
    q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask, differ, sizes, rank, world,
    strategy, group,
):  # fmt: skip
    parts: list[Any] = []

    def local():
        pairs = (diagonal, period, query_groups, key_groups, key_mask, differ)
        parts[:] = op.attention(q, k, scale_tensor, scale, *pairs)

    def visit(held, rows):
        other, *sides = unpack(held)
        pairs = (None, None, query_groups, *sides, differ)
        parts[:] = _merge(parts, op.attention(q, other, scale_tensor, scale, *pairs))
        return []

    cargo, unpack = _cargo(k, key_groups, key_mask)
    trip(Route(rank, row_counts(k.shape[0], sizes, world), group, strategy, False), cargo, local, visit, SUM)
    return tuple(parts)


def _shard_forward(q, shard, scale_tensor, scale, sizes, rank, world, strategy, group):
    def meet(queries):
        return list(op.attention(queries, shard, scale_tensor, scale, None, None, None, None, None, False))

    own: list[Tensor] = []
    route = Route(rank, row_counts(q.shape[0], sizes, world), group, strategy, False)
    home, _ = trip(route, [q], lambda: own.extend(meet(q)), lambda held, rows: meet(held[0]), PARTS)
    return tuple(_merge(own, home))


attention = define(
    f"distributed_attention(Tensor q, Tensor k, {op._SCALE}, {op._PAIRS}, {_WAY}) -> {_RESULT}",
    reference=_forward,
    fake=op._attention_fake,
    everywhere=True,
)
shard_attention = define(
    f"distributed_shard_attention(Tensor q, Tensor shard, {op._SCALE}, {_WAY}) -> {_RESULT}",
    reference=_shard_forward,
    fake=op._attention_fake,
    everywhere=True,
)


def _autograd(arguments: int) -> Any:
    # every argument after the scale is without gradient
    return lambda ctx, *grads: (*op._attention_autograd(ctx, *grads)[:4], *(None,) * (arguments - 4))


differentiable(attention, setup_context=op._attention_setup, backward=_autograd(15))
differentiable(shard_attention, setup_context=op._attention_setup, backward=_autograd(9))
