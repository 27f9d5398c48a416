# SPDX-License-Identifier: Apache-2.0
"""Rows of predictions against rows of targets, a few whole rows in the registers of a program: each is read once.

Bound by bytes: a row of `pred`, one of `target`, and the gradient's, which is written.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._columns import centered, moments
from sslkernels.triton._tiles import load_tile


@triton.jit
def standard(x, inside, width, eps):
    """Rows of mean zero and variance one; the mean of a row far from zero is rounded, hence twice."""
    x = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    x = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    return x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / width + eps))[:, None]


@triton.jit
def length(x):
    """Of each row, where its squares leave float32's range too."""
    largest = tl.max(tl.abs(x), 1)
    unit = tl.where((largest < 1e15) & (largest > 1e-15), 1.0, largest)
    unit = tl.where(largest == 0.0, 1.0, unit)
    x = tl.div_rn(x, tl.broadcast_to(unit[:, None], x.shape))
    return tl.sqrt_rn(tl.sum(x * x, 1)) * unit


@triton.jit
def directions(p, t, eps, COSINE: tl.constexpr):
    """(value, slopes) of 1 - <u, v> or |u - v|^2 of unit rows, from their difference, which does not cancel.

    It is that of p and t stretched to p's length: an error of the lengths has nearly the direction of p, which the
    gradient has not.
    """
    length_p = length(p)
    length_t = length(t)
    constant = length_p < eps  # below eps the divisor is one
    own = tl.where(constant, eps, length_p)
    other = tl.where(length_t < eps, eps, length_t)
    sane = (own > 1e-15) & (own < 1e15) & (other > 1e-15) & (other < 1e15)
    ratio = tl.div_rn(tl.where(sane, own, 1.0), other)
    inverse = tl.div_rn(tl.full(own.shape, 1.0, tl.float32), own)
    unit = tl.where(sane, inverse, 1.0)
    p *= tl.where(sane, 1.0, inverse)[:, None]
    away = p - t * ratio[:, None]
    distance = tl.sum(away * away, 1) * unit * unit
    share = tl.sum(away * p, 1) * unit * unit
    if COSINE:
        short_p = tl.where(constant, 1.0 - (length_p * inverse) * (length_p * inverse), 0.0)
        v = length_t / other
        value = 0.5 * (distance + short_p + tl.where(length_t < eps, 1.0 - v * v, 0.0))
        share = tl.where(constant, 1.0, share)
        factor = unit * inverse
    else:
        value = distance
        share = tl.where(constant, 0.0, share)
        factor = 2.0 * unit * inverse
    return value, factor[:, None] * (away - share[:, None] * p)


@triton.jit
def differences(d, width, beta, LOSS: tl.constexpr):
    """(value, slopes) of the losses that are means over elements."""
    far = tl.abs(d)
    if LOSS == "l2":
        element = d * d
        slope = 2.0 * d
    elif LOSS == "l1":
        element = far
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))  # NaN passes
    else:
        near = tl.where(far < beta, far, beta)
        element = near * (far - 0.5 * near) / beta
        slope = tl.where(d > beta, 1.0, tl.where(d < -beta, -1.0, d / beta))
    return tl.sum(element, 1) / width, slope * (1.0 / width)


@triton.jit
def row_offsets(rows, second, third, stride0, stride1, stride2):
    rows = rows.to(tl.int64)
    return rows // third // second * stride0 + rows // third % second * stride1 + rows % third * stride2


@triton.jit
def total_count(counts, parts):
    total = 0
    for i in range(parts):
        total += tl.load(counts + i)
    return total


@triton.jit
def regression_kernel(
    pred, target, ids, mask, grad, counts, dpred, values, partials,
    rows, width, second, third, p0, p1, p2, p_column, t0, t1, t2, t_column, target_rows, per_sample, sample, target_row,
    parts, beta, eps, scale,
    LOSS: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row that counts its value and, times grad_i or scale or scale / count, its gradient; 0 of the others."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    exists = i < rows
    kept = exists
    if mask is not None:
        kept = kept & (tl.load(mask + i, mask=exists, other=0) != 0)
    place = row_offsets(i, second, third, t0, t1, t2)
    known = kept
    if ids is not None:
        chosen = tl.load(ids + i, mask=exists, other=0)
        known = kept & (chosen >= 0) & (chosen < target_rows)
        place = (i // per_sample).to(tl.int64) * sample + chosen * target_row
    within = column < width
    inside = kept[:, None] & within[None, :]
    at = row_offsets(i, second, third, p0, p1, p2)
    p = tl.load(pred + at[:, None] + (column.to(tl.int64) * p_column)[None, :], mask=inside, other=0.0).to(tl.float32)
    found = known[:, None] & within[None, :]
    t = tl.load(target + place[:, None] + (column.to(tl.int64) * t_column)[None, :], mask=found, other=0.0)
    t = t.to(tl.float32)
    if NORMALIZE:
        t = standard(t, within[None, :], width, eps)
    if ids is not None:
        t = tl.where(inside & (known == 0)[:, None], float("nan"), t)
    if LOSS == "cosine":
        value, slopes = directions(p, t, eps, True)
    elif LOSS == "normalized_l2":
        value, slopes = directions(p, t, eps, False)
    else:
        value, slopes = differences(tl.where(inside, p - t, 0.0), width, beta, LOSS)
    value = tl.where(kept, value, 0.0)
    if values is not None:
        tl.store(values + i, value, mask=exists)
    if partials is not None:
        tl.store(partials + tl.program_id(0), tl.sum(value.to(tl.float64), 0))
    if dpred is not None:
        if grad is not None:
            weight = tl.load(grad + i, mask=exists, other=0.0).to(tl.float32)
        else:
            weight = tl.full((ROWS,), scale, tl.float32)
        if counts is not None:
            weight /= total_count(counts, parts)
        slopes = tl.where(inside, slopes * weight[:, None], 0.0).to(dpred.dtype.element_ty)
        tl.store(
            dpred + i[:, None].to(tl.int64) * width + column[None, :], slopes, mask=exists[:, None] & within[None, :]
        )


@triton.jit
def count_kernel(mask, counts, rows, SPAN: tl.constexpr):
    i = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    kept = tl.load(mask + i, mask=i < rows, other=0) != 0
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))


@triton.jit
def mean_kernel(value, partials, counts, programs, parts, scale, BLOCK: tl.constexpr):
    """The sum over programs, in float64 in a fixed order, times scale or scale / count."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        total += tl.load(partials + start + i, mask=start + i < programs, other=0.0)
    result = tl.sum(total, 0) * scale
    if counts is not None:
        result /= total_count(counts, parts)
    tl.store(value, result.to(tl.float32))


@triton.jit
def add_layer(x, total, shift, rest, inverse, r, c, rows, columns, row_stride, column_stride, STANDARD: tl.constexpr):
    """total + x standardised by its columns, or as it is."""
    if x is not None:
        if STANDARD:
            value = centered(x, r, c, shift, rest, rows, columns, row_stride, column_stride) * inverse[None, :]
        else:
            value = load_tile(x, r, c, row_stride, column_stride, rows, columns).to(tl.float32)
        total += value
    return total


@triton.jit
def layer_moments(x, c, rows, columns, row_stride, column_stride, eps, STANDARD: tl.constexpr, BLOCK_R: tl.constexpr):
    shift = tl.zeros(c.shape, tl.float32)
    rest = shift
    inverse = shift
    if STANDARD and x is not None:
        shift, rest, variance = moments(x, c, rows, columns, row_stride, column_stride, BLOCK_R)
        inverse = 1.0 / tl.sqrt_rn(variance + eps)
    return shift, rest, inverse


@triton.jit
def average_kernel(
    x0, x1, x2, x3, out, rows, columns, sample_stride, row_stride, column_stride, eps, factor,
    FIRST: tl.constexpr, STANDARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (+)= factor times the sum of up to four layers of the same strides, each STANDARD over its rows."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(0).to(tl.int64)
    out += sample * rows * columns
    x0 += sample * sample_stride
    if x1 is not None:
        x1 += sample * sample_stride
    if x2 is not None:
        x2 += sample * sample_stride
    if x3 is not None:
        x3 += sample * sample_stride
    s0, m0, i0 = layer_moments(x0, c, rows, columns, row_stride, column_stride, eps, STANDARD, BLOCK_R)
    s1, m1, i1 = layer_moments(x1, c, rows, columns, row_stride, column_stride, eps, STANDARD, BLOCK_R)
    s2, m2, i2 = layer_moments(x2, c, rows, columns, row_stride, column_stride, eps, STANDARD, BLOCK_R)
    s3, m3, i3 = layer_moments(x3, c, rows, columns, row_stride, column_stride, eps, STANDARD, BLOCK_R)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        total = add_layer(x0, total, s0, m0, i0, r, c, rows, columns, row_stride, column_stride, STANDARD)
        total = add_layer(x1, total, s1, m1, i1, r, c, rows, columns, row_stride, column_stride, STANDARD)
        total = add_layer(x2, total, s2, m2, i2, r, c, rows, columns, row_stride, column_stride, STANDARD)
        total = add_layer(x3, total, s3, m3, i3, r, c, rows, columns, row_stride, column_stride, STANDARD)
        total *= factor
        if not FIRST:
            total += load_tile(out, r, c, columns, 1, rows, columns)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(out + r[:, None].to(tl.int64) * columns + c[None, :], total, mask=inside)


@triton.jit
def layer_norm_kernel(x, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """In place, rows of a dense matrix."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (i < rows)[:, None] & (column < width)[None, :]
    offsets = i[:, None].to(tl.int64) * width + column[None, :]
    value = standard(tl.load(x + offsets, mask=inside, other=0.0), (column < width)[None, :], width, eps)
    tl.store(x + offsets, value, mask=inside)
