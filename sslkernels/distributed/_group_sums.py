# SPDX-License-Identifier: Apache-2.0
"""Sums over the rows of one group on all ranks: the positives of a supervised loss.

    sums_i = sum of x_j over all j with group_j = group_i

is a symmetric matrix times x: the gradient is the same op on what comes in, with no table of groups anywhere. Rows
travel and are added where their group is at home, so that a ring holds no more than two ranks' rows.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.distributed._collectives import row_counts
from sslkernels.distributed._trips import SUM, Route, trip
from sslkernels.ops._registry import define, differentiable
from sslkernels.reference._precision import compute_dtype


def _sums(
    x: Tensor, groups: Tensor, sizes: Tensor | None, rank: int, world: int, strategy: str, group: str
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    sums = x.new_zeros(n + 1, x.shape[1], dtype=compute_dtype(x))  # the last row: of groups that no own row is in
    counts = sums.new_zeros(n + 1)

    def add(rows: Tensor, their_groups: Tensor) -> None:
        place = torch.searchsorted(groups, their_groups)  # the first of the own rows, in ascending order, of that group
        place = place.where(groups[place.clamp(max=n - 1)] == their_groups, n)
        sums.index_add_(0, place, rows.to(sums.dtype))
        counts.index_add_(0, place, counts.new_ones(1).expand(len(rows)))

    def visit(held, rows):
        add(*held)
        return []

    route = Route(rank, row_counts(n, sizes, world), group, strategy, half=False)
    trip(route, [x, groups], lambda: add(x, groups), visit, SUM)
    first = torch.searchsorted(groups, groups)
    return sums[first], counts[first]


def _fake(x, groups, *rest):
    sums = torch.empty_like(x, dtype=compute_dtype(x), memory_format=torch.contiguous_format)
    return sums, sums.new_empty(x.shape[0])


group_sums = define(
    "distributed_group_sums(Tensor x, Tensor groups, Tensor? sizes, SymInt rank, SymInt world, str strategy, str group)"
    " -> (Tensor sums, Tensor counts)",
    reference=_sums,
    fake=_fake,
    everywhere=True,
)


def _setup(ctx, inputs, output) -> None:
    x, groups, sizes, *ctx.route = inputs
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(groups, sizes)


def _autograd(ctx, grad, grad_counts):
    groups, sizes = ctx.saved_tensors
    dx = None if grad is None else group_sums(grad, groups, sizes, *ctx.route)[0].to(ctx.dtype)
    return dx, *(None,) * 6


differentiable(group_sums, setup_context=_setup, backward=_autograd)
