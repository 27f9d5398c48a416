# SPDX-License-Identifier: Apache-2.0
"""The log-sum-exps of the contrastive ops over the keys of all ranks: the local ops, block by block, and a trip.

A pair of a sample and its own key lies on one rank, so `diagonal` and `period` of an exclusion hold for the own block
alone; groups and masks travel with the keys. The softmax weights of a block need the log-sum-exp of all blocks and no
more, so that backward is the local backward op on each block, with that in place of the block's own.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.distributed._collectives import row_counts
from sslkernels.distributed._trips import LOGADDEXP, SUM, Route, trip
from sslkernels.ops import _contrastive as op
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference._precision import compute_dtype

_ROUTE = "Tensor? sizes, SymInt rank, SymInt world, str strategy, bool keep, str group"


def _cargo(*xs: Tensor | None) -> tuple[list[Tensor], Any]:
    """The tensors that are there, and how to find them again in such a list."""
    places = [i for i, x in enumerate(xs) if x is not None]

    def unpack(held: list[Tensor]) -> list[Tensor | None]:
        found = dict(zip(places, held))
        return [found.get(i) for i in range(len(xs))]

    return [x for x in xs if x is not None], unpack


def _part(x: Tensor | None, rows: slice, dim: int = 0) -> Tensor | None:
    if x is None or rows == slice(None):
        return x
    return x[rows] if dim == 0 else x[:, rows].contiguous()


def _summed(x: Tensor) -> Tensor:
    """x as the blocks of a backward take it, whose gradients, in its dtype, are added up.

    On the CPU, where kernels compute in float32 anyhow, they are rounded once, after the sum. A GPU's tensor cores take
    16 bits, and each block's gradient is rounded to them.
    """
    return x.to(compute_dtype(x)) if x.device.type == "cpu" else x


def _forward(
    q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask, differ, scales, columns, offset,
    half, sizes, rank, world, strategy, keep, group,
):  # fmt: skip
    pairs = (diagonal, period, query_groups, key_groups, key_mask, differ)
    keys = q if k is None else k
    groups = query_groups if k is None else key_groups
    meets_columns = half if k is None else columns
    own: list[Any] = []

    def local():
        if k is None:
            lse, positive, top, _ = op.self_lse(
                q, scale_tensor, scale, diagonal, period, query_groups, key_mask, differ, scales, False, offset
            )
            own.extend([lse, None, positive, top])
        else:
            own.extend(op.lse(q, k, scale_tensor, scale, *pairs, scales, columns, False, offset)[:4])

    def visit(held, rows):
        other, other_groups, other_mask = unpack(held)
        part = (None, None, _part(query_groups, rows), other_groups, other_mask, differ)
        row, col, _, top, _ = op.lse(q[rows], other, scale_tensor, scale, *part, scales, meets_columns, False, None)
        own[0][:, rows] = torch.logaddexp(own[0][:, rows], row)
        own[3][rows] = torch.maximum(own[3][rows], top)
        return [col.T] if meets_columns else []

    cargo, unpack = _cargo(keys, groups, key_mask)
    route = Route(rank, row_counts(keys.shape[0], sizes, world), group, strategy, half)
    home, gathered = trip(route, cargo, local, visit, LOGADDEXP)
    row, col, positive, top = own
    if k is None:
        row = torch.logaddexp(row, home[0].T) if home else row
        col = row.new_empty(0)
    elif columns:
        col = torch.logaddexp(col, home[0].T)
    return row, col, positive, top, gathered if keep and gathered is not None else q.new_empty(0)


def _backward(
    grad_row, grad_col, grad_positive, q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask,
    differ, scales, offset, half, row, col, gathered, sizes, rank, world, strategy, keep, group, output_mask,
):  # fmt: skip
    pairs = (diagonal, period, query_groups, key_groups, key_mask, differ)
    keys = q if k is None else k
    groups = query_groups if k is None else key_groups
    dtype, none = compute_dtype(q, keys), q.new_empty(0)
    if k is None:
        wanted = [output_mask[0], output_mask[0], output_mask[2]]
        sides = (row.T, grad_row.T) if half else (None, None)
    else:
        wanted = list(output_mask)
        sides = (col.T, grad_col.T) if grad_col is not None else (None, None)
    wide_q = _summed(q)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    dk = torch.zeros(keys.shape, dtype=dtype, device=q.device)
    dscale = torch.zeros((), dtype=dtype, device=q.device)

    def add(rows, block_dq, block_dscale):
        if wanted[0]:
            dq[rows] += block_dq
        if wanted[2]:
            dscale.add_(block_dscale)

    def local():
        if k is None:
            dz, ds = op.self_lse_backward(
                grad_row, grad_positive, wide_q, scale_tensor, scale, diagonal, period, query_groups, key_mask, differ,
                scales, offset, row, none, [wanted[0], wanted[2]],
            )  # fmt: skip
            add(slice(None), dz, ds)
            return
        block_dq, block_dk, ds = op.lse_backward(
            grad_row, grad_col, grad_positive, wide_q, _summed(k), scale_tensor, scale, *pairs, scales, offset, row,
            col, none, wanted,
        )  # fmt: skip
        add(slice(None), block_dq, ds)
        if wanted[1]:
            dk.add_(block_dk)

    def visit(held, rows):
        other, other_groups, other_mask, other_lse, other_grad = unpack(held)
        part = (None, None, _part(query_groups, rows), other_groups, other_mask, differ)
        lse = none if other_lse is None else other_lse.T.contiguous()
        grad = None if other_grad is None else other_grad.T.contiguous()
        block_dq, block_dk, ds = op.lse_backward(
            _part(grad_row, rows, 1), grad, None, wide_q[rows], _summed(other), scale_tensor, scale, *part, scales,
            None, _part(row, rows, 1), lse, none, wanted,
        )  # fmt: skip
        add(rows, block_dq, ds)
        return [block_dk.to(dtype)] if wanted[1] else []

    cargo, unpack = _cargo(keys, groups, key_mask, *sides)
    route = Route(rank, row_counts(keys.shape[0], sizes, world), group, strategy, half)
    home, _ = trip(route, cargo, local, visit, SUM, gathered if keep and gathered.numel() else None)
    if home:
        dk += home[0]
    if k is None:
        return (dq + dk).to(q.dtype), none, dscale
    return dq.to(q.dtype), dk.to(k.dtype), dscale


def _fake(
    q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask, differ, scales, columns, offset,
    half, sizes, rank, world, strategy, keep, group,
):  # fmt: skip
    keys = q if k is None else k
    dtype, n, m = compute_dtype(q, keys), q.shape[0], keys.shape[0]
    return (
        q.new_empty(len(scales), n, dtype=dtype),
        q.new_empty((len(scales), m) if columns and k is not None else (0,), dtype=dtype),
        q.new_empty(n if offset is not None else 0, dtype=dtype),
        q.new_empty(n, dtype=dtype),
        keys.new_empty((m * world, keys.shape[1]) if keep and strategy == "gather" else (0,)),
    )


logsumexp = define(
    f"distributed_logsumexp(Tensor q, Tensor? k, {op._SCALE}, {op._PAIRS}, float[] scales, bool columns,"
    f" SymInt? offset, bool half, {_ROUTE})"
    " -> (Tensor row_lse, Tensor col_lse, Tensor positive, Tensor row_max, Tensor gathered)",
    reference=_forward,
    fake=_fake,
    everywhere=True,
)
logsumexp_backward = define(
    f"distributed_logsumexp_backward(Tensor grad_row, Tensor? grad_col, Tensor? grad_positive, Tensor q, Tensor? k,"
    f" {op._SCALE}, {op._PAIRS}, float[] scales, SymInt? offset, bool half, Tensor row_lse, Tensor col_lse,"
    f" Tensor gathered, {_ROUTE}, bool[3] output_mask) -> (Tensor dq, Tensor dk, Tensor dscale)",
    reference=_backward,
    fake=lambda grad_row, grad_col, grad_positive, q, k, *rest: (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(0) if k is None else torch.empty_like(k, memory_format=torch.contiguous_format),
        q.new_empty((), dtype=compute_dtype(q, q if k is None else k)),
    ),
    everywhere=True,
)


def _setup(ctx, inputs, output) -> None:
    q, k, scale_tensor, ctx.scale, ctx.diagonal, ctx.period, *sides, ctx.differ, ctx.scales, columns = inputs[:12]
    ctx.offset, ctx.half, sizes, *ctx.route = inputs[12:]
    row, col, positive, top, gathered = output
    absent = [x for x, there in ((col, columns and k is not None), (positive, ctx.offset is not None)) if not there]
    ctx.mark_non_differentiable(top, gathered, *absent)
    ctx.save_for_backward(q, k, scale_tensor, *sides, row, col, gathered, sizes)


def _autograd(ctx, grad_row, grad_col, grad_positive, grad_top, grad_gathered):
    q, k, scale_tensor, *sides, row, col, gathered, sizes = ctx.saved_tensors
    grad_row = torch.zeros_like(row) if grad_row is None else grad_row
    mask = list(ctx.needs_input_grad[:3])
    dq, dk, dscale = logsumexp_backward(
        grad_row, grad_col, grad_positive, q, k, scale_tensor, ctx.scale, ctx.diagonal, ctx.period, *sides, ctx.differ,
        ctx.scales, ctx.offset, ctx.half, row, col, gathered, sizes, *ctx.route, mask,
    )  # fmt: skip
    dscale = op._asked_scalar(dscale, scale_tensor, mask[2])
    return op._asked(dq, mask[0]), op._asked(dk, mask[1]), dscale, *(None,) * 17


differentiable(logsumexp, setup_context=_setup, backward=_autograd)
once_differentiable(logsumexp_backward)
