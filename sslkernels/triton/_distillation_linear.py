# SPDX-License-Identifier: Apache-2.0
"""Soft cross-entropy of the logits of a prototype layer, which live in registers.

A first sweep makes the logits in tiles and keeps each row's peak. Then, a panel of prototypes at a time: the teachers'
probabilities are made again and stored, the students' logits are made again and become slopes, which are stored in the
operands' dtype, and torch's matrix products turn the panel into its part of the prototypes' gradient, which is
finished, and of the students', which adds up. Panels of prototypes, not of samples: the gradient of the prototypes,
larger than all else, is written once, and prototypes are read three times, however many samples there are.

DINO's head (64 samples, 2 + 10 views, D = 256, 65,536 prototypes, bfloat16): a product of the students is 21 GFLOP, of
the teachers 4; four and two of them are 95 GFLOP, 0.16 ms at 600 TFLOP/s. Panels are 32 MiB, which the L2 cache holds.
The eager loss moves about 4 GB through its 18 pairs of float32 rows, 1.2 ms at 3.35 TB/s, besides 4 products.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sslkernels.triton._distillation_rows import LOWEST, Peaks, center_strides, mean_rows
from sslkernels.triton._distillation_soft import share_numbers
from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._panel import PANEL_BYTES, add_product, panels, product
from sslkernels.triton._scores import products
from sslkernels.triton._tiles import LOG2E, log1p, precision

SMALLEST = 32 << 20  # bytes of a panel that are always allowed: less launches more, and more leaves the L2 cache


@triton.jit
def subtract_center(y, center, rows, v, batch, columns, center_view, center_stride, VIEWS: tl.constexpr):
    """y - center of each row's view (VIEWS), or of all."""
    if center is not None:
        at = v.to(tl.int64) * center_stride
        if VIEWS:
            offsets = (rows // batch).to(tl.int64)[:, None] * center_view + at[None, :]
            y -= tl.load(center + offsets, mask=(v < columns)[None, :], other=0.0).to(tl.float32)
        else:
            y -= tl.load(center + at, mask=v < columns, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def logit_peak_kernel(
    hidden, weight, center, top, rest, at, factor, n, batch, columns, depth, columns_a_part,
    h_row, h_column, w_row, w_column, center_view, center_stride, VIEWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The peak of each row of logits over one part of the prototypes; parts of few rows fill the device."""
    blocks = tl.cdiv(n, BLOCK_N)
    part = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, n - 1)
    highest = tl.full((BLOCK_N,), LOWEST, tl.float32)
    others = tl.zeros((BLOCK_N,), tl.float32)
    place = tl.zeros((BLOCK_N,), tl.int32)
    end = tl.minimum(columns, (part + 1) * columns_a_part)
    for start in range(part * columns_a_part, end, BLOCK_M):
        v = (start + tl.arange(0, BLOCK_M)).to(tl.int32)
        y = products(
            hidden, weight, rows, v, n, columns, depth, h_row, h_column, w_row, w_column,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
        y = subtract_center(y, center, inside, v, batch, columns, center_view, center_stride, VIEWS)
        y = tl.where((v < end)[None, :], y, -float("inf"))
        here = tl.max(y, 1)
        above = tl.maximum(highest, here)
        first = tl.min(tl.where(y == here[:, None], v[None, :], 2147483647), 1)
        place = tl.where(here > highest, first, place)
        e = tl.exp2((y - above[:, None]) * factor)
        e = tl.where(v[None, :] == place[:, None], 0.0, e)
        before = tl.where(here > highest, (others + 1) * tl.exp2((highest - above) * factor), others)
        others = before + tl.sum(e, 1)
        highest = above
    out = part.to(tl.int64) * n + rows
    tl.store(top + out, highest, mask=rows < n)
    tl.store(rest + out, others, mask=rows < n)
    tl.store(at + out, place, mask=rows < n)


@triton.jit
def merge_peaks_kernel(
    part_top, part_rest, part_at, top, excess, at, factor, n, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PARTS)
    offsets = p.to(tl.int64)[:, None] * n + r[None, :]
    mask = (p < parts)[:, None] & (r < n)[None, :]
    tops = tl.load(part_top + offsets, mask=mask, other=LOWEST)
    places = tl.load(part_at + offsets, mask=mask, other=2147483647)
    highest = tl.max(tops, 0)
    place = tl.min(tl.where(tops == highest[None, :], places, 2147483647), 0)
    share = tl.exp2((tops - highest[None, :]) * factor)
    own = (tops == highest[None, :]) & (places == place[None, :])
    rest = tl.load(part_rest + offsets, mask=mask, other=0.0) * share + tl.where(own, 0.0, share)
    others = tl.sum(tl.where(mask, rest, 0.0), 0)
    tl.store(top + r, highest, mask=r < n)
    tl.store(excess + r, tl.where(highest > LOWEST, others, float("nan")), mask=r < n)
    tl.store(at + r, place, mask=r < n)


@triton.jit
def probabilities_kernel(
    hidden, weight, center, top, excess, out, factor, batch, teachers, begin, columns, depth, width,
    h_row, h_column, w_row, w_column, center_view, center_stride, VIEWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of a panel of prototypes, (teachers + 1, batch, width): of each teacher view, then of all."""
    blocks = tl.cdiv(batch, BLOCK_N)
    samples = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(samples, batch - 1)
    column = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    v = begin + column
    mask = (samples < batch)[:, None] & (column < width)[None, :]
    everyone = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for t in range(0, teachers):
        rows = t * batch + inside
        y = products(
            hidden, weight, rows, v, teachers * batch, columns, depth, h_row, h_column, w_row, w_column,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
        y = subtract_center(y, center, rows, v, batch, columns, center_view, center_stride, VIEWS)
        p = tl.exp2((y - tl.load(top + rows)[:, None]) * factor) / (1 + tl.load(excess + rows))[:, None]
        everyone += p
        tl.store(out + rows[:, None] * width + column[None, :], p, mask=mask)
    rows = teachers * batch + inside
    tl.store(out + rows[:, None] * width + column[None, :], everyone, mask=mask)


@triton.jit
def slopes_kernel(
    hidden, weight, p, row_weight, numbers, slopes, partial,
    s_top, s_excess, s_at, t_excess, t_at, norm, scale, factor, steepness,
    n, batch, teachers, excluded, begin, columns, depth, width,
    h_row, h_column, w_row, w_column, weight_stride, slope_row,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The slopes of a panel of logits (n, width), if asked for, and each row's loss over a tile of prototypes."""
    blocks = tl.cdiv(n, BLOCK_N)
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, n - 1)
    column = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    v = begin + column
    x = products(
        hidden, weight, rows, v, n, columns, depth, h_row, h_column, w_row, w_column,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
    )  # fmt: skip
    view = inside // batch
    b = inside % batch
    barred = view < excluded
    w = tl.full((BLOCK_N,), 1.0, tl.float32)
    if row_weight is not None:
        w = tl.load(row_weight + b.to(tl.int64) * weight_stride).to(tl.float32)
    if numbers is not None:
        norm = tl.load(numbers)
        scale = tl.load(numbers + 1)
    number = tl.where(barred, teachers - 1, teachers).to(tl.float32)
    live = tl.where((w != 0) & (number > 0), 1, 0)
    top = tl.load(s_top + inside)
    excess = tl.load(s_excess + inside)
    at = tl.load(s_at + inside)

    # rows of a view that is itself a teacher's meet the others one by one, the rest meet their sum
    seen = (column < width)[None, :]
    others = teachers * batch + b
    target = tl.load(
        p + others[:, None] * width + column[None, :],
        mask=seen & ((live != 0) & (view >= excluded))[:, None],
        other=0.0,
    )
    peak = at - begin  # the student's peak, where it lies in this tile
    mine = (at >= tl.min(v, 0)) & (at <= tl.max(v, 0)) & (at < begin + width)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    for t in range(0, teachers):
        row = t * batch + b
        met = (live != 0) & (view != tl.where(barred, t, -1))
        target += tl.load(p + row[:, None] * width + column[None, :], mask=seen & (met & barred)[:, None], other=0.0)
        there = tl.load(p + row * width + peak, mask=mine & met, other=1.0)
        far = tl.load(t_excess + row)
        rest += tl.where(tl.load(t_at + row) == at, far / (1 + far), 1 - there) * tl.where(met, 1.0, 0.0)

    # the peak's logit may differ in its last bit from what the sweep before has found
    d = tl.where(v[None, :] == at[:, None], 0.0, x - top[:, None])
    if slopes is not None:
        inverse = 1 / (1 + excess)
        slope = tl.exp2(d * factor) * (number * inverse)[:, None] - target
        # slopes sum to zero: where one prototype has most of the mass, its own is that of the others
        own = rest - number * (excess * inverse)
        slope = tl.where(v[None, :] == tl.where(excess < 1, at, -1)[:, None], own[:, None], slope)
        slope = tl.where((live != 0)[:, None], slope * (w * (norm * steepness / scale))[:, None], 0.0)
        place = slopes + rows[:, None] * slope_row + column[None, :]
        tl.store(place, slope.to(slopes.dtype.element_ty), mask=(rows < n)[:, None] & seen)
    value = tl.sum(tl.where(seen, target * -d, 0.0), 1) * steepness
    value += tl.where(tl.max(v, 0) < BLOCK_M, number * log1p(excess), 0.0)  # once a row: in the first tile
    here = partial + (tl.program_id(0) // blocks).to(tl.int64) * n + rows
    tl.store(here, tl.where(live != 0, value, 0.0) * (w * norm), mask=rows < n)


@triton.jit
def weigh_kernel(weight, mean, out, columns, depth, w_row, w_column, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """<weight_v, mean>: the mean of the logits, from the mean of the rows."""
    v = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, depth, BLOCK_C):
        d = start + tl.arange(0, BLOCK_C)
        offsets = v.to(tl.int64)[:, None] * w_row + d.to(tl.int64)[None, :] * w_column
        w = tl.load(weight + offsets, mask=(v < columns)[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32)
        total += w * tl.load(mean + d, mask=d < depth, other=0.0)[None, :]
    tl.store(out + v, tl.sum(total, 1), mask=v < columns)


def _products_options(kind, hidden, weight):
    tile = shape(kind, hidden, weight)
    return {**tile, "EVEN": weight.shape[1] % tile["BLOCK_D"] == 0, "PRECISION": precision()}


def _find_peaks(hidden, weight, center, temperature, batch):
    """Peaks of the rows of hidden weight^T - center."""
    n, (columns, depth) = hidden.shape[0], weight.shape
    options = _products_options("prototypes", hidden, weight)
    blocks, tiles = cdiv(n, options["BLOCK_N"]), cdiv(columns, options["BLOCK_M"])
    tiles_a_part = cdiv(tiles, max(1, min(tiles, 2 * multiprocessors(hidden) // blocks, 256)))
    parts = cdiv(tiles, tiles_a_part)
    top, rest = hidden.new_empty(2, parts, n, dtype=torch.float32).unbind()
    found = top, rest, hidden.new_empty(parts, n, dtype=torch.int32)
    factor = LOG2E.value / temperature
    sizes = factor, n, batch, columns, depth, tiles_a_part * options["BLOCK_M"]
    strides = *hidden.stride(), *weight.stride(), *center_strides(center)
    views = center is not None and center.shape[0] > 1
    operands = hidden, weight, center, *found, *sizes, *strides
    launch(logit_peak_kernel, (blocks * parts,), *operands, VIEWS=views, **options)
    top, excess = hidden.new_empty(2, n, dtype=torch.float32).unbind()
    peaks = Peaks(top, excess, hidden.new_empty(n, dtype=torch.int32))
    tile = {"PARTS": triton.next_power_of_2(parts), "BLOCK": 16, "num_warps": 4}
    launch(merge_peaks_kernel, (cdiv(n, 16),), *found, *peaks, factor, n, parts, **tile)
    return peaks


def _mean_logits(teacher, weight):
    mean = mean_rows(teacher)
    out = weight.new_empty(weight.shape[0], dtype=torch.float32)
    tile = shape("column_sums", weight)
    grid = (cdiv(weight.shape[0], tile["BLOCK_R"]),)
    launch(weigh_kernel, grid, weight, mean, out, *weight.shape, *weight.stride(), **tile)
    return out


def linear_soft_cross_entropy(
    student, weight, teacher, teacher_weight, center, row_weight, student_temp, teacher_temp, exclude, mean,
    return_center, panel_bytes, output_mask,
):  # fmt: skip
    teacher_weight = weight if teacher_weight is None else teacher_weight
    (views, batch, depth), teachers, columns = student.shape, teacher.shape[0], weight.shape[0]
    n, excluded = views * batch, min(views, teachers) if exclude else 0
    empty = student.new_empty(0, dtype=torch.float32)
    column_mean = _mean_logits(teacher, teacher_weight) if return_center else empty
    dstudent = student.new_empty(n, depth, dtype=torch.float32) if output_mask[0] else empty
    dweight = weight.new_empty(columns, depth, dtype=torch.float32) if output_mask[1] else empty
    if not n:
        loss = empty.new_full((), math.nan if mean else 0.0)
        return loss, column_mean, dstudent.view(student.shape) if output_mask[0] else empty, dweight.zero_()

    # hidden rows are small, so that they are put together
    h, g = student.reshape(n, depth), teacher.reshape(teachers * batch, -1)
    counted = h
    if row_weight is not None:  # of what does not count not even a NaN: 0 * NaN is one
        counted = student.masked_fill((row_weight == 0)[:, None], 0.0).reshape(n, depth)
    narrow = student.dtype == weight.dtype
    dtype = student.dtype if narrow else torch.float32
    steepness = teachers / student_temp / 2**15 if dtype == torch.float16 else 0.0
    norm, scale, numbers = share_numbers(row_weight, views * teachers - excluded, batch, steepness, mean)
    s_peaks = _find_peaks(h, weight, None, student_temp, batch)
    t_peaks = _find_peaks(g, teacher_weight, center, teacher_temp, batch)

    gradients = any(output_mask)
    s_options = _products_options("prototypes", h, weight)
    t_options = _products_options("teachers", g, teacher_weight)
    block = s_options["BLOCK_M"]
    bytes_of_prototype = n * dtype.itemsize * gradients + (teachers + 1) * batch * 4
    limit = min(max(panel_bytes, SMALLEST, columns * bytes_of_prototype // 8), PANEL_BYTES)
    cuts = list(panels(columns, bytes_of_prototype, torch.uint8, limit, block))
    most = cuts[0].stop
    memory = h.new_empty(n * most if gradients else 0, dtype=dtype)
    probabilities = h.new_empty((teachers + 1) * batch * most, dtype=torch.float32)
    partial = h.new_empty(most // block + 1, n, dtype=torch.float32)
    losses = h.new_empty(len(cuts), dtype=torch.float32)
    s_blocks, t_blocks = cdiv(n, s_options["BLOCK_N"]), cdiv(batch, t_options["BLOCK_N"])
    ends = *teacher_weight.stride(), *center_strides(center)
    several = center is not None and center.shape[0] > 1
    for cut, loss in zip(cuts, losses.unbind()):
        begin, width = cut.start, cut.stop - cut.start
        tiles = cdiv(width, block)
        operands = g, teacher_weight, center, t_peaks.top, t_peaks.excess, probabilities, LOG2E.value / teacher_temp
        sizes = batch, teachers, begin, columns, g.shape[1], width, *g.stride(), *ends
        grid = (t_blocks * cdiv(width, t_options["BLOCK_M"]),)
        launch(probabilities_kernel, grid, *operands, *sizes, VIEWS=several, **t_options)
        slopes = memory[: n * width].view(-1, width)
        written = slopes if gradients else None
        operands = h, weight, probabilities, row_weight, numbers, written, partial, *s_peaks, *t_peaks[1:]
        sizes = n, batch, teachers, excluded, begin, columns, depth, width
        strides = *h.stride(), *weight.stride(), 0 if row_weight is None else row_weight.stride(0), width
        factors = norm, scale, LOG2E.value / student_temp, 1 / student_temp
        launch(slopes_kernel, (s_blocks * tiles,), *operands, *factors, *sizes, *strides, **s_options)
        torch.sum(partial[:tiles], (0, 1), out=loss)
        if output_mask[0]:
            add_product(dstudent, slopes, weight[cut], first=begin == 0)
        if output_mask[1]:
            product(slopes.T, counted, out=dweight[cut])
    if steepness:
        for x, wanted in zip((dstudent, dweight), output_mask):
            if wanted:
                x.mul_(scale if numbers is None else numbers[1])
    return losses.sum(), column_mean, dstudent.view(student.shape) if output_mask[0] else empty, dweight
