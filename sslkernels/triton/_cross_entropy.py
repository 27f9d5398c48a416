# SPDX-License-Identifier: Apache-2.0
"""Softmax losses whose row weights are known in the forward: log-sum-exps, then every gradient.

With frozen keys one sweep does (`_attention.py`: the softmax-weighted keys are dq up to a row's factor): 2 products.
With a gradient of the keys the scores are computed twice, as the weights need the row's whole sum: the forward's sweep,
then the panel of `_gradients.py`, 4 products in all, or for D <= 128 its registers, 5. To keep unnormalised weights of
the first sweep instead would write and read the panel once more, 4 bytes an element: no gain below D = 800 on an H100.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._attention import similarity_row_attention
from sslkernels.triton._gradients import NO_PARTNER, NO_SIDE, Side, Sweep, gradients, unit_of
from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._lse import sweep
from sslkernels.triton._scores import load_rows, pairs
from sslkernels.triton._sums import add_up, margin_loss
from sslkernels.triton._tiles import scalar


@triton.jit
def margins_kernel(
    lse, positive, weight, uniform, partials, slope, dpositive, n, positive_stride, weight_stride,
    q, context, dq, dscale, scale_tensor, scale, depth, q_row, q_column,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of rows: their losses' sum, d loss / d lse, and with the context what it makes of dq and dscale."""
    program = tl.program_id(0)
    rows = program * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    margin = tl.load(lse + rows, mask=inside, other=0.0)
    margin -= tl.load(positive + rows.to(tl.int64) * positive_stride, mask=inside, other=0.0).to(tl.float32)
    w = tl.where(inside, uniform, 0.0)
    if weight is not None:
        w = tl.load(weight + rows.to(tl.int64) * weight_stride, mask=inside, other=0.0).to(tl.float32)
    value, up = margin_loss(margin, w, DECOUPLED)
    tl.store(partials + program, tl.sum(tl.where(inside, value, 0.0), 0))
    if slope is not None:
        tl.store(slope + rows, up, mask=inside)
    if dpositive is not None:
        tl.store(dpositive + rows, -up, mask=inside)
    if context is not None:
        factor = up * scalar(scale_tensor, scale)
        along = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, depth, BLOCK_D):
            c = load_rows(context, rows, n, start, depth, depth, 1, BLOCK_D, False)
            a = load_rows(q, rows, n, start, depth, q_row, q_column, BLOCK_D, False).to(tl.float32)
            along += tl.sum(c * a, 1)
            if dq is not None:
                d = start + tl.arange(0, BLOCK_D)
                at = dq + rows[:, None].to(tl.int64) * depth + d[None, :]
                tl.store(at, factor[:, None] * c, mask=inside[:, None] & (d < depth)[None, :])
        if dscale is not None:
            tl.store(partials + tl.num_programs(0) + program, tl.sum(tl.where(inside, along * up, 0.0), 0))


def margins(
    lse, positive, weight, uniform, decoupled, slope=None, dpositive=None, q=None, context=None, dq=None, dscale=None,
    scale_tensor=None, scale=1.0,
):  # fmt: skip
    """The loss, a scalar tensor, of rows' log-sum-exps and positives; the tensors that are given are written."""
    n, loss = lse.shape[0], lse.new_empty(())
    block = shape("complete", lse) if context is not None else {"BLOCK_D": 16} | shape("row", lse)
    programs = cdiv(n, block["BLOCK"])
    sums = [x for x in (loss, dscale) if x is not None]
    partials = lse.new_empty(len(sums), programs)
    launch(
        margins_kernel, (programs,), lse, positive, weight, uniform, partials, slope, dpositive, n, positive.stride(0),
        0 if weight is None else weight.stride(0), q, context, dq, dscale, scale_tensor, scale,
        0 if q is None else q.shape[1], *((0, 0) if q is None else q.stride()), DECOUPLED=decoupled, **block,
    )  # fmt: skip
    add_up(partials, *sums)
    return loss


def similarity_cross_entropy(
    q, k, positive, weight, uniform_weight, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask,
    differ, decoupled, output_mask,
):  # fmt: skip
    want_q, want_k, want_positive, want_scale = output_mask
    n, exclude = q.shape[0], (diagonal, period, query_groups, key_groups, key_mask, differ)
    empty = lambda when, *sizes: torch.empty(sizes if when else 0, dtype=torch.float32, device=q.device)  # noqa: E731
    dpositive, losses = empty(want_positive, n), (positive, weight, uniform_weight, decoupled)
    if not want_k and (want_q or want_scale):
        row, top, context = similarity_row_attention(q, k, scale_tensor, scale, *exclude)
        dq, dscale = empty(want_q, *q.shape), empty(want_scale)
        loss = margins(
            row, *losses, None, dpositive if want_positive else None, q, context, dq if want_q else None,
            dscale if want_scale else None, scale_tensor, scale,
        )  # fmt: skip
        return loss, row, top, dq, empty(False), dpositive, dscale
    rules = pairs(*exclude, n=n, m=k.shape[0])
    row, _, _, top = sweep(q, k, scale_tensor, scale, rules, (1.0,), False, None)
    slope = empty(want_k, n)
    loss = margins(row[0], *losses, slope if want_k else None, dpositive if want_positive else None)
    if not want_k:
        return loss, row[0], top, empty(False), empty(False), dpositive, empty(False)
    side = Side(row, slope[None])
    unit = unit_of(q, k, (1.0,), side, NO_SIDE)
    weights = Sweep(q, k, (scale_tensor, scale), (1.0,), unit, side, NO_SIDE, NO_PARTNER, rules, wide=True)
    dq, dk, dscale = gradients(weights, want_q, True, want_scale)
    none = empty(False)
    return loss, row[0], top, dq if want_q else none, dk, dpositive, dscale
