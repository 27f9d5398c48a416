# SPDX-License-Identifier: Apache-2.0
"""SigLIP's softplus sums over the keys of all ranks: the local ops, block by block, and a trip.

A softplus needs no normaliser, so a block is done when it has been visited. Where the weights of the rows are known,
each visit emits the gradients too: those of the keys come home with the same trip, and backward exchanges nothing.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch

from sslkernels.distributed._attention import _WAY
from sslkernels.distributed._collectives import row_counts
from sslkernels.distributed._logsumexp import _ROUTE, _cargo, _summed
from sslkernels.distributed._trips import SUM, Route, trip
from sslkernels.ops import _contrastive_sums as op
from sslkernels.ops._contrastive import _BIAS, _PAIRS, _SCALE, _asked, _asked_scalar
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference._precision import compute_dtype

# the weighted sum, which emits its gradients


def _sum_forward(
    q, k, weight, uniform_weight, scale_tensor, scale, bias_tensor, bias, diagonal, period, query_groups, key_groups,
    key_mask, differ, sizes, rank, world, strategy, group, output_mask,
):  # fmt: skip
    numbers = (weight, uniform_weight, scale_tensor, scale, bias_tensor, bias)
    own: list[Any] = []

    def local():
        pairs = (diagonal, period, query_groups, key_groups, key_mask, differ)
        own.extend(op.softplus_sum(q, k, *numbers, *pairs, output_mask))

    def visit(held, rows):
        other, other_groups, other_mask = unpack(held)
        pairs = (None, None, query_groups, other_groups, other_mask, differ)
        loss, dq, dk, dscale, dbias = op.softplus_sum(q, other, *numbers, *pairs, output_mask)
        for total, part in zip(own, (loss, dq, None, dscale, dbias)):
            if part is not None:
                total += part
        return [dk] if output_mask[1] else []

    cargo, unpack = _cargo(k, key_groups, key_mask)
    home, _ = trip(Route(rank, row_counts(k.shape[0], sizes, world), group, strategy, False), cargo, local, visit, SUM)
    if home:
        own[2] += home[0]
    return tuple(own)


softplus_sum = define(
    f"distributed_softplus_sum(Tensor q, Tensor k, Tensor? weight, float uniform_weight, {_SCALE}, {_BIAS}, {_PAIRS},"
    f" {_WAY}, bool[4] output_mask) -> (Tensor loss, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    reference=_sum_forward,
    fake=op._softplus_sum_fake,
    everywhere=True,
)
differentiable(
    softplus_sum,
    setup_context=op._softplus_sum_setup,
    backward=lambda ctx, *grads: (*op._softplus_sum_autograd(ctx, *grads), *(None,) * 5),
)

# the rows


def _forward(
    q, k, scale_tensor, scale, bias_tensor, bias, diagonal, period, query_groups, key_groups, key_mask, differ,
    sizes, rank, world, strategy, keep, group,
):  # fmt: skip
    numbers = (scale_tensor, scale, bias_tensor, bias)
    own: list[Any] = []

    def local():
        own.append(op.softplus(q, k, *numbers, diagonal, period, query_groups, key_groups, key_mask, differ))

    def visit(held, rows):
        other, other_groups, other_mask = unpack(held)
        own[0] += op.softplus(q, other, *numbers, None, None, query_groups, other_groups, other_mask, differ)
        return []

    cargo, unpack = _cargo(k, key_groups, key_mask)
    route = Route(rank, row_counts(k.shape[0], sizes, world), group, strategy, False)
    _, gathered = trip(route, cargo, local, visit, SUM)
    return own[0], gathered if keep and gathered is not None else q.new_empty(0)


def _backward(
    grad, q, k, scale_tensor, scale, bias_tensor, bias, diagonal, period, query_groups, key_groups, key_mask, differ,
    gathered, sizes, rank, world, strategy, keep, group, output_mask,
):  # fmt: skip
    numbers = (scale_tensor, scale, bias_tensor, bias)
    dtype, wide_q = compute_dtype(q, k), _summed(q)
    dq, dk, dscale, dbias = (
        torch.zeros(shape if wanted else 0, dtype=dtype, device=q.device)
        for shape, wanted in zip((q.shape, k.shape, (), ()), output_mask)
    )

    def add(*parts):
        for total, part, wanted in zip((dq, dk, dscale, dbias), parts, output_mask):
            if wanted and part is not None:
                total += part

    def local():
        pairs = (diagonal, period, query_groups, key_groups, key_mask, differ)
        add(*op.softplus_backward(grad, wide_q, _summed(k), *numbers, *pairs, output_mask))

    def visit(held, rows):
        other, other_groups, other_mask = unpack(held)
        pairs = (None, None, query_groups, other_groups, other_mask, differ)
        block = (grad, wide_q, _summed(other), *numbers, *pairs, output_mask)
        block_dq, block_dk, ds, db = op.softplus_backward(*block)
        add(block_dq, None, ds, db)
        return [block_dk.to(dtype)] if output_mask[1] else []

    cargo, unpack = _cargo(k, key_groups, key_mask)
    route = Route(rank, row_counts(k.shape[0], sizes, world), group, strategy, False)
    home, _ = trip(route, cargo, local, visit, SUM, gathered if keep and gathered.numel() else None)
    if home:
        dk += home[0]
    return dq.to(q.dtype), dk.to(k.dtype), dscale, dbias


def _fake(q, k, *rest):
    world, strategy, keep = rest[-4:-1]
    gathered = (k.shape[0] * world, k.shape[1]) if keep and strategy == "gather" else (0,)
    return q.new_empty(q.shape[0], dtype=compute_dtype(q, k)), k.new_empty(gathered)


softplus = define(
    f"distributed_softplus(Tensor q, Tensor k, {_SCALE}, {_BIAS}, {_PAIRS}, {_ROUTE})"
    " -> (Tensor rows, Tensor gathered)",
    reference=_forward,
    fake=_fake,
    everywhere=True,
)
softplus_backward = define(
    f"distributed_softplus_backward(Tensor grad, Tensor q, Tensor k, {_SCALE}, {_BIAS}, {_PAIRS}, Tensor gathered,"
    f" {_ROUTE}, bool[4] output_mask) -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    reference=_backward,
    fake=op._softplus_backward_fake,
    everywhere=True,
)


def _setup(ctx, inputs, output) -> None:
    q, k, scale_tensor, ctx.scale, bias_tensor, ctx.bias, ctx.diagonal, ctx.period, *masks, ctx.differ = inputs[:12]
    sizes, *ctx.route = inputs[12:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, scale_tensor, bias_tensor, *masks, output[1], sizes)


def _autograd(ctx, grad, grad_gathered):
    q, k, scale_tensor, bias_tensor, *masks, gathered, sizes = ctx.saved_tensors
    grad = torch.zeros(q.shape[0], dtype=compute_dtype(q, k), device=q.device) if grad is None else grad
    mask = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    dq, dk, dscale, dbias = softplus_backward(
        grad, q, k, scale_tensor, ctx.scale, bias_tensor, ctx.bias, ctx.diagonal, ctx.period, *masks, ctx.differ,
        gathered, sizes, *ctx.route, mask,
    )  # fmt: skip
    dscale, dbias = _asked_scalar(dscale, scale_tensor, mask[2]), _asked_scalar(dbias, bias_tensor, mask[3])
    return _asked(dq, mask[0]), _asked(dk, mask[1]), dscale, None, dbias, *(None,) * 13


differentiable(softplus, setup_context=_setup, backward=_autograd)
once_differentiable(softplus_backward)
