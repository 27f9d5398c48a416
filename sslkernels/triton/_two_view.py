# SPDX-License-Identifier: Apache-2.0
"""NT-Xent from two views' raw rows to its loss and gradients, for batches whose launches cost more than their work.

A small batch takes three launches: unit rows; log-sum-exps, slopes and partial sums, a block of rows a program; W z and
the normalisation's gradient, where the first program adds the partial sums up. All pairs are computed, not half: 2N =
512 rows at D = 128 are 0.2e9 operations in all, less than a microsecond of an H100, and 2N = 2,048 are 3e9, 10 to 30
microseconds in blocks of 16 rows that fill the chip. A larger batch or wider rows take the sweeps of `_lse.py` and
`_gradients.py`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._cross_entropy import margins
from sslkernels.triton._gradients import Partner, Side, Sweep, gradients, unit_of
from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._lse import self_similarity_logsumexp
from sslkernels.triton._rows import l2_normalize, normalize_backward_kernel
from sslkernels.triton._scores import finite, leave_out, load_rows, pairs
from sslkernels.triton._sums import add_up, margin_loss, vector_sum
from sslkernels.triton._tiles import LN2, LOG2E, dot, precision, scalar

EPS = 1e-12  # of torch.nn.functional.normalize
ROWS = 2048  # above, half of the pairs and larger tiles are worth their launches


@triton.jit
def unit_rows_kernel(
    out0, out1, z, norm, eps, n, depth, row0, column0, row1, column1, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of both views, of unit length, one view below the other."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    inside = d < depth
    first = tl.load(
        out0 + rows[:, None].to(tl.int64) * row0 + d * column0, mask=(rows < n)[:, None] & inside, other=0.0
    )
    second = tl.load(
        out1 + (rows - n)[:, None].to(tl.int64) * row1 + d * column1,
        mask=((rows >= n) & (rows < 2 * n))[:, None] & inside, other=0.0,
    )  # fmt: skip
    x = tl.where((rows < n)[:, None], first, second).to(tl.float32)
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    # NaN is neither above nor below eps: it must come out as NaN
    x = x / tl.where(length < eps, eps, length)[:, None]
    tl.store(norm + rows, length, mask=rows < 2 * n)
    at = z + rows[:, None] * depth + d
    tl.store(at, x.to(z.dtype.element_ty), mask=(rows < 2 * n)[:, None] & inside)


@triton.jit
def view_scores(a, z, j, rows, n, depth, scale2, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """(keys, products, scores in units of log 2) of a block of rows with tile j of keys; self and partner left out."""
    columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
    b = load_rows(z, columns, 2 * n, 0, depth, depth, 1, BLOCK_D, False)
    x = dot(a, tl.trans(b), tl.zeros((a.shape[0], BLOCK_M), tl.float32), PRECISION)
    return b, x, leave_out(x * scale2, rows, columns, 2 * n, 2 * n, 0, n, None, None, None, None, False)


@triton.jit
def two_view_kernel(
    z, weight, uniform, scale_tensor, scale, lse, positive, row_max, slope, partials, n, depth, weight_stride,
    DECOUPLED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows: all but the gradients of the features; loss and dscale as sums of the block."""
    program = tl.program_id(0)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < 2 * n
    number = scalar(scale_tensor, scale)
    a = load_rows(z, rows, 2 * n, 0, depth, depth, 1, BLOCK_D, False)
    high = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    dots = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(0, tl.cdiv(2 * n, BLOCK_M)):
        _, x, s = view_scores(a, z, j, rows, n, depth, number * LOG2E, BLOCK_M, BLOCK_D, PRECISION)
        higher = tl.maximum(high, tl.max(s, 1))
        reference = finite(higher)
        e = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(high - reference)
        total = total * shrink + tl.sum(e, 1)
        dots = dots * shrink + tl.sum(e * x, 1)
        high = higher
    partners = load_rows(z, (rows + n) % (2 * n), 2 * n, 0, depth, depth, 1, BLOCK_D, False)
    beside = tl.sum(a.to(tl.float32) * partners.to(tl.float32), 1)
    found = (finite(high) + tl.log2(total)) * LN2
    w = tl.where(inside, uniform, 0.0)
    if weight is not None:
        w = tl.load(weight + rows.to(tl.int64) * weight_stride, mask=inside, other=0.0).to(tl.float32)
    value, up = margin_loss(found - beside * number, w, DECOUPLED)
    tl.store(lse + rows, found, mask=inside)
    tl.store(positive + rows, beside * number, mask=inside)
    # a maximum may drop a NaN, a sum never does
    tl.store(row_max + rows, tl.where(found != found, found, high * LN2), mask=inside)
    tl.store(slope + rows, up, mask=inside)
    along = up * (dots / tl.where(total == 0.0, 1.0, total) - beside)
    tl.store(partials + program, tl.sum(tl.where(inside, value, 0.0), 0))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(tl.where(inside, along, 0.0), 0))


@triton.jit
def two_view_backward_kernel(
    z, norm, eps, scale_tensor, scale, lse, slope, dout0, dout1, partials, loss, dscale, n, depth, count,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows' gradients, through the normalisation; the first program also adds up the partial sums."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(loss, vector_sum(partials, count, 64))
        if dscale is not None:
            tl.store(dscale, vector_sum(partials + count, count, 64))
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < 2 * n
    number = scalar(scale_tensor, scale)
    a = load_rows(z, rows, 2 * n, 0, depth, depth, 1, BLOCK_D, False)
    lift = 1.0
    if z.dtype.element_ty == tl.float16:  # the largest slope times a probability of 1 goes to 2^13
        every = tl.arange(0, ROWS)
        slopes = tl.abs(tl.load(slope + every, mask=every < 2 * n, other=0.0))
        top = tl.max(tl.where(slopes < float("inf"), slopes, 0.0), 0)
        lift = tl.where(top > 0.0, 8192.0 / top, 1.0)
    up = tl.load(slope + rows, mask=inside, other=0.0)
    shift = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
    shift = tl.where(shift == -float("inf"), 0.0, shift)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for j in range(0, tl.cdiv(2 * n, BLOCK_M)):
        b, _, s = view_scores(a, z, j, rows, n, depth, number * LOG2E, BLOCK_M, BLOCK_D, PRECISION)
        columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
        column_up = tl.load(slope + columns, mask=columns < 2 * n, other=0.0)
        column_shift = tl.load(lse + columns, mask=columns < 2 * n, other=0.0) * LOG2E
        column_shift = tl.where(column_shift == -float("inf"), 0.0, column_shift)
        w = up[:, None] * tl.exp2(s - shift[:, None]) + column_up[None, :] * tl.exp2(s - column_shift[None, :])
        total = dot((w * lift).to(b.dtype), b, total, PRECISION)
    other = (rows + n) % (2 * n)
    partners = load_rows(z, other, 2 * n, 0, depth, depth, 1, BLOCK_D, False).to(tl.float32)
    pair = up + tl.load(slope + other, mask=inside, other=0.0)
    total = (total / lift - pair[:, None] * partners) * number
    length = tl.load(norm + rows, mask=inside, other=1.0)
    wide = a.to(tl.float32)
    # a row shorter than eps was divided by a constant
    along = tl.where(length > eps, tl.sum(total * wide, 1), 0.0)
    total = (total - along[:, None] * wide) / tl.where(length < eps, eps, length)[:, None]
    d = tl.arange(0, BLOCK_D)
    if dout0 is not None:
        at = dout0 + rows[:, None] * depth + d[None, :]
        tl.store(at, total, mask=(rows < n)[:, None] & (d < depth)[None, :])
    if dout1 is not None:
        at = dout1 + (rows - n)[:, None] * depth + d[None, :]
        tl.store(at, total, mask=((rows >= n) & inside)[:, None] & (d < depth)[None, :])


def two_view_cross_entropy(out0, out1, weight, uniform_weight, scale_tensor, scale, decoupled, output_mask):
    (n, depth), (want0, want1, want_scale) = out0.shape, output_mask
    tile = shape("two_view", out0)
    if n == 0 or 2 * n > ROWS or depth > tile["DEPTH"]:
        return _composed(out0, out1, weight, uniform_weight, scale_tensor, scale, decoupled, output_mask)
    blocks = {"BLOCK_N": tile["BLOCK_N"], "BLOCK_D": max(triton.next_power_of_2(depth), 16)}
    swept = blocks | {name: tile[name] for name in tile if name not in ("DEPTH", "BLOCK_N")}
    programs = cdiv(2 * n, tile["BLOCK_N"])
    empty = lambda *sizes: torch.empty(sizes, dtype=torch.float32, device=out0.device)  # noqa: E731
    z, norm, slope, partials = out0.new_empty(2 * n, depth), empty(2 * n), empty(2 * n), empty(2, programs)
    loss, lse, positive, top = empty(), empty(2 * n), empty(2 * n), empty(2 * n)
    dout0, dout1 = (empty(*out0.shape) if want else None for want in (want0, want1))
    dscale = empty() if want_scale else None
    strides = *out0.stride(), *out1.stride()
    launch(unit_rows_kernel, (programs,), out0, out1, z, norm, EPS, n, depth, *strides, **blocks)
    launch(
        two_view_kernel, (programs,), z, weight, uniform_weight, scale_tensor, scale, lse, positive, top, slope,
        partials, n, depth, 0 if weight is None else weight.stride(0), DECOUPLED=decoupled, **swept,
        PRECISION=precision(),
    )  # fmt: skip
    if want0 or want1:
        launch(
            two_view_backward_kernel, (programs,), z, norm, EPS, scale_tensor, scale, lse, slope, dout0, dout1,
            partials, loss, dscale, n, depth, programs, ROWS=ROWS, **swept, PRECISION=precision(),
        )  # fmt: skip
    else:
        add_up(partials, *(x for x in (loss, dscale) if x is not None))
    return loss, lse, positive, top, *(empty(0) if x is None else x for x in (dout0, dout1, dscale))


def _composed(out0, out1, weight, uniform_weight, scale_tensor, scale, decoupled, output_mask):
    """The ops that it stands for, one after the other."""
    n, depth = out0.shape
    z, norm = l2_normalize([out0, out1], EPS)
    exclude = 0, max(n, 1), None, None, False
    lse, positive, top, _ = self_similarity_logsumexp(z, scale_tensor, scale, *exclude, (1.0,), False, n)
    slope, down = torch.empty_like(positive), torch.empty_like(positive)
    loss = margins(lse[0], positive, weight, uniform_weight, decoupled, slope, down)
    side = Side(lse, slope[None])
    rules = pairs(0, max(n, 1), None, None, None, False, n=2 * n, m=2 * n)
    unit = unit_of(z, z, (1.0,), side, side)
    weights = Sweep(
        z, z, (scale_tensor, scale), (1.0,), unit, side, side, Partner(down, n, 3), rules, wide=True
    )  # fmt: skip
    want_rows = output_mask[0] or output_mask[1]
    dz, _, dscale = gradients(weights, want_rows, False, output_mask[2], share=0.5)
    outputs = []
    for view, wanted in ((slice(0, n), output_mask[0]), (slice(n, 2 * n), output_mask[1])):
        out = torch.empty((n, depth) if wanted else 0, dtype=torch.float32, device=z.device)
        if wanted:
            operands = dz[view], z[view], norm[view], out, EPS, depth, depth, 1
            launch(normalize_backward_kernel, (n,), *operands, **shape("row", z))
        outputs.append(out)
    return loss, lse[0], positive, top, *outputs, dscale
