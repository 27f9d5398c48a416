# SPDX-License-Identifier: Apache-2.0
"""Softmax of rows of logits: where the largest is and what the others sum to, probabilities, means of columns.

A row's softmax is known by its peak: the largest element, its place, and the excess, which is the sum of the
exponentials of all others relative to it. Where excess is small, 1 / (1 + excess), log1p(excess) and excess / (1 +
excess) keep the digits that a log-sum-exp would round away. One exponential an element, no reduction inside the loop.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._tiles import LOG2E

LOWEST = tl.constexpr(-3.4028234e38)  # no element of a row yet: nothing is infinity less infinity


class Peaks(NamedTuple):
    """Of rows, in the order (view, sample): float32, float32, int32."""

    top: Tensor
    excess: Tensor
    at: Tensor


@triton.jit
def load_row(x, center, v, columns, column_stride, center_stride):
    """x - center in float32; -inf right of `columns`."""
    y = tl.load(x + v.to(tl.int64) * column_stride, mask=v < columns, other=-float("inf")).to(tl.float32)
    if center is not None:
        y -= tl.load(center + v.to(tl.int64) * center_stride, mask=v < columns, other=0.0).to(tl.float32)
    return y


@triton.jit
def peak(x, center, columns, column_stride, center_stride, factor, BLOCK: tl.constexpr):
    """Largest element of a row, the sum of the others' 2^((x - top) factor), and its place. NaN, +inf, or nothing above
    -inf make that sum NaN."""
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, columns, BLOCK, num_stages=3):
        v = start + tl.arange(0, BLOCK)
        y = load_row(x, center, v, columns, column_stride, center_stride)
        d = y - top
        e = tl.exp2(-tl.abs(d) * factor)
        rest = tl.where(d > 0, (rest + 1) * e, rest + e)
        at = tl.where(d > 0, v.to(tl.int32), at)
        top = tl.where(d > 0, y, top)
    highest = tl.max(top, 0)
    place = tl.min(tl.where(top == highest, at, 2147483647), 0)
    share = tl.exp2((top - highest) * factor)
    own = (top == highest) & (at == place)
    excess = tl.sum(rest * share + tl.where(own, 0.0, share), 0)
    return highest, tl.where(highest > LOWEST, excess, float("nan")), place


@triton.jit
def peak_kernel(
    x, center, weight, top, excess, at, factor, views, batch, columns,
    view_stride, row_stride, column_stride, center_view, center_stride, weight_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, the views of a sample side by side; a sample of weight zero is not read."""
    program = tl.program_id(0)
    b = (program // views).to(tl.int64)
    view = (program % views).to(tl.int64)
    if weight is not None:
        columns = tl.where(tl.load(weight + b * weight_stride) == 0, 0, columns)
    if center is not None:
        center += view * center_view
    x += view * view_stride + b * row_stride
    highest, others, place = peak(x, center, columns, column_stride, center_stride, factor, BLOCK)
    row = view * batch + b
    tl.store(top + row, highest)
    tl.store(excess + row, others)
    tl.store(at + row, place)


@triton.jit
def softmax_kernel(
    x, center, out, factor, batch, columns,
    view_stride, row_stride, column_stride, center_view, center_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """softmax((x - center) / temperature) of one row a program; its second reading is from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    x += row // batch * view_stride + row % batch * row_stride
    if center is not None:
        center += row // batch * center_view
    out += row * columns
    top, excess, _ = peak(x, center, columns, column_stride, center_stride, factor, BLOCK)
    inverse = 1 / (1 + excess)
    for start in tl.range(0, columns, BLOCK, num_stages=3):
        v = start + tl.arange(0, BLOCK)
        y = load_row(x, center, v, columns, column_stride, center_stride)
        tl.store(out + v, tl.exp2((y - top) * factor) * inverse, mask=v < columns)


@triton.jit
def column_sums_kernel(
    x, out, factor, batch, rows, columns, rows_a_part, view_stride, row_stride, column_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """factor times the sum of a part of the rows (views * batch), which the second dimension of the grid counts."""
    v = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    end = tl.minimum(rows, (part + 1) * rows_a_part)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(part * rows_a_part, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        offsets = (r // batch).to(tl.int64) * view_stride + (r % batch).to(tl.int64) * row_stride
        mask = (r < end)[:, None] & (v < columns)[None, :]
        total += tl.load(x + offsets[:, None] + v.to(tl.int64)[None, :] * column_stride, mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out + part.to(tl.int64) * columns + v, tl.sum(total, 0) * factor, mask=v < columns)


def as_views(x):
    """(S, B, V) of (S, B, V) or (B, V)."""
    return x if x.dim() == 3 else x.unsqueeze(0)


def center_strides(center):
    """From one teacher view to the next, and from one prototype to the next."""
    return (0, 0) if center is None else (center.stride(0) if center.shape[0] > 1 else 0, center.stride(1))


def find_peaks(xs, center, temperature, row_weight=None):
    """The peaks of the rows of (B, V) and (S, B, V), all views in order."""
    xs = [as_views(x) for x in xs]
    batch, columns = xs[0].shape[1:]
    rows = sum(x.shape[0] for x in xs) * batch
    top, excess = xs[0].new_empty(2, rows, dtype=torch.float32).unbind()
    peaks = Peaks(top, excess, xs[0].new_empty(rows, dtype=torch.int32))
    strides = *center_strides(center), 0 if row_weight is None else row_weight.stride(0)
    first = 0
    for x in xs:
        own = (p[first:] for p in peaks)
        sizes = LOG2E.value / temperature, x.shape[0], batch, columns, *x.stride(), *strides
        launch(peak_kernel, (x.shape[0] * batch,), x, center, row_weight, *own, *sizes, **shape("row_peak", x))
        first += x.shape[0] * batch
    return peaks


def softmax_rows(x, center, temperature):
    """softmax((x - center) / temperature) of (T, B, V), float32, with a centre (1, V) or (T, V)."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    sizes = LOG2E.value / temperature, *x.shape[1:], *x.stride(), *center_strides(center)
    launch(softmax_kernel, (x.shape[0] * x.shape[1],), x, center, out, *sizes, **shape("row_peak", x))
    return out


def mean_rows(x):
    """(V,), the mean over the first two dimensions of (T, B, V), in float32."""
    rows, columns = x.shape[0] * x.shape[1], x.shape[2]
    tile = shape("column_sums", x)
    blocks = cdiv(columns, tile["BLOCK_C"])
    # enough programs to fill the device, and no more parts than there are tiles of rows
    parts = max(1, min(2 * multiprocessors(x) // blocks, cdiv(rows, tile["BLOCK_R"])))
    each = cdiv(rows, parts)
    out = x.new_empty(parts, columns, dtype=torch.float32)
    factor = 1 / rows if rows else float("nan")
    sizes = factor if parts == 1 else 1.0, max(x.shape[1], 1), rows, columns, each, *x.stride()
    launch(column_sums_kernel, (blocks, parts), x, out, *sizes, **tile)
    if parts > 1:
        sizes = factor, parts, parts, columns, parts, 0, *out.stride()
        out, partial = out.new_empty(columns), out
        launch(column_sums_kernel, (blocks, 1), partial, out, *sizes, **tile)
    return out.reshape(columns)
