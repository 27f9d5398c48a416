# SPDX-License-Identifier: Apache-2.0
"""Kernels of linear_cross_entropy: only the rows that count meet the layer, and nothing asks the host how many.

`select_kernel` lists these rows, first in `order`; all other kernels walk along positions in it and end at once behind
the last that counts, so time goes with the rows that count: BERT's 15% cost 15%. torch's mm cannot stop early and would
multiply all of them, which outweighs the fifth by which it is faster on full tiles. As the product is ours, its tiles
become exponentials against their row's largest logit before they are stored: 16 bits a logit hold them to 2^-9, while
sums, losses and log-sum-exps come from the unrounded ones. A pass makes them slopes in place, and two products follow.

An H100 with bfloat16, 8,192 x 1,024 x 32,000: 3 products, 1.6e12 operations, 3.2 ms at 500e12 a second; slopes in place
0.5 GB read, 0.5 GB written, 0.4 ms; the layer's float32 gradient is read and written 8 times, 2.0 GB, 0.7 ms; that of
the rows in parts, 0.5 GB, 0.2 ms.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._scores import products
from sslkernels.triton._tiles import LOG2E, dot, load_tile, log1p

_MOVING = ["first", "rows"]  # of a chunk: no kernel of its own for each


@triton.jit(do_not_specialize=["ignore_index"])
def select_kernel(target, order, count, total, ignore_index, stride, BLOCK: tl.constexpr):
    """order: the rows whose target counts, ascending, and behind them the others; count: how many do."""
    found = tl.zeros((), tl.int32)
    for start in range(0, total, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < total
        counts = inside & (tl.load(target + row.to(tl.int64) * stride, mask=inside, other=0) != ignore_index)
        ahead = found + tl.cumsum(counts.to(tl.int32), 0)
        # another stands behind as many from the end as there were others before it
        tl.store(order + tl.where(counts, ahead - 1, total - 1 - (row - ahead)), row, mask=inside)
        found += tl.sum(counts.to(tl.int32), 0)
    tl.store(count, found)


@triton.jit(do_not_specialize=_MOVING)
def logits_kernel(
    x, weight, bias, target, order, count, partial, known, panel,
    first, rows, total, classes, depth, x_row, x_column, w_row, w_column, bias_stride, target_stride, panel_row,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of logits. Of each row all but the target's: the largest and the sum of exponentials against it into
    partial (2, strips, rows); the exponentials into the panel, where there is one. `known` (4, rows), if given, is each
    row's log-sum-exp and what `slopes_of` tells: then the slopes go into the panel, and no more."""
    blocks = tl.cdiv(rows, BLOCK_N)
    strip = tl.program_id(0) // blocks
    begin = (tl.program_id(0) % blocks) * BLOCK_N
    left = tl.minimum(tl.load(count) - first, rows)
    if begin >= left:
        return
    n = begin + tl.arange(0, BLOCK_N)
    v = strip * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(order + first + n, mask=n < left, other=0)
    t = tl.load(target + row.to(tl.int64) * target_stride, mask=n < left, other=-1)
    s = products(
        x, weight, row, v, total, classes, depth, x_row, x_column, w_row, w_column,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
    )  # fmt: skip
    if bias is not None:
        s += tl.load(bias + v.to(tl.int64) * bias_stride, mask=v < classes, other=0.0).to(tl.float32)[None, :]
    own = v[None, :] == t[:, None]
    if known is not None:
        known += n
        lse = tl.load(known, mask=n < left, other=0.0)
        factor = tl.load(known + rows, mask=n < left, other=0.0)
        even = tl.load(known + 2 * rows, mask=n < left, other=0.0)
        at_target = tl.load(known + 3 * rows, mask=n < left, other=0.0)
        e = factor[:, None] * tl.exp2((s - lse[:, None]) * LOG2E) - even[:, None]
        e = tl.where(own, at_target[:, None], e)
    else:
        s = tl.where((v < classes)[None, :] & (own == 0), s, -float("inf"))
        top = tl.max(s, 1)
        e = tl.exp2((s - tl.where(top == -float("inf"), 0.0, top)[:, None]) * LOG2E)
        strips = tl.cdiv(classes, BLOCK_M)
        partial += strip * rows + n
        tl.store(partial, top, mask=n < left)
        tl.store(partial + strips * rows, tl.sum(e, 1), mask=n < left)
    if panel is not None:
        panel += begin.to(tl.int64) * panel_row + strip * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None].to(tl.int64) * panel_row + tl.arange(0, BLOCK_M)[None, :]
        tl.store(panel + at, e.to(panel.dtype.element_ty), mask=(n < left)[:, None] & (v < classes)[None, :])


@triton.jit
def slopes_of(lse, doubt, share, smoothing, z, classes):
    """Of share times the loss along the logits: share (factor softmax - even), but at the target."""
    pull = 2.0 * z * lse if z > 0 else tl.zeros_like(lse)
    even = smoothing / classes
    at_target = pull - (1.0 + pull) * doubt + smoothing - even
    return share * (1.0 + pull), share * even, share * at_target


@triton.jit(do_not_specialize=_MOVING)
def join_kernel(
    x, weight, bias, target, order, count, weight_sum, bias_sum, partial, losses, stats, known, hidden,
    first, rows, total, classes, depth, smoothing, z,
    x_row, x_column, w_row, w_column, bias_stride, target_stride,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What strips found of a row, and its target's logit, joined to its loss; sums over classes are for smoothing: all
    logits' mean is the row's product with the mean class. stats (3, total), if asked for; `known`
    and the rows of x, gathered, if there will be gradients. A target that is no class makes all of it NaN."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    left = tl.load(count) - first
    live = n < tl.minimum(left, rows)
    row = tl.load(order + first + n, mask=n < rows, other=0).to(tl.int64)
    t = tl.load(target + row * target_stride, mask=live, other=0)
    good = (t >= 0) & (t < classes)
    t = tl.where(good, t, 0)
    own = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    every = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < depth)[None, :]
        a = tl.load(x + row[:, None] * x_row + d[None, :].to(tl.int64) * x_column, mask=inside, other=0.0)
        b = tl.load(weight + t[:, None] * w_row + d[None, :].to(tl.int64) * w_column, mask=inside, other=0.0)
        own += a.to(tl.float32) * b.to(tl.float32)
        if weight_sum is not None:
            every += a.to(tl.float32) * tl.load(weight_sum + d, mask=d < depth, other=0.0)[None, :]
        if hidden is not None:
            at = n[:, None].to(tl.int64) * depth + d[None, :]
            tl.store(hidden + at, a.to(hidden.dtype.element_ty), mask=inside)
    own = tl.sum(own, 1)
    if bias is not None:
        own += tl.load(bias + t * bias_stride, mask=live, other=0.0).to(tl.float32)
    # infinite: as a softmax that subtracts its largest logit
    own = tl.where(good & (own != float("inf")), own, float("nan"))
    strips = tl.cdiv(classes, BLOCK_V)
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, strips, BLOCK_S):
        k = start + tl.arange(0, BLOCK_S)
        at = partial + k[:, None] * rows + n[None, :]
        inside = (k < strips)[:, None] & live[None, :]
        m = tl.load(at, mask=inside, other=-float("inf"))
        s = tl.load(at + strips * rows, mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(m, 0))
        against = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.exp2((top - against) * LOG2E) + tl.sum(s * tl.exp2((m - against[None, :]) * LOG2E), 0)
        top = higher
    others = top + tl.log(tl.where(live, sums, 1.0))
    gap = others - own
    small = tl.exp2(-tl.abs(gap) * LOG2E)
    above = tl.maximum(gap, 0.0) + log1p(small)
    lse = tl.where(own == -float("inf"), others, own + above)
    doubt = tl.where(gap > 0, 1.0, small) / (1.0 + small)
    loss = above
    if weight_sum is not None:
        mean = tl.sum(every, 1)
        if bias_sum is not None:
            mean += tl.load(bias_sum)
        loss += smoothing * (own - mean / classes)
    if z > 0:
        loss += z * lse * lse
    tl.store(losses + row, tl.where(live, loss, 0.0), mask=n < rows)
    if stats is not None:
        tl.store(stats + row, tl.where(live, lse, 0.0), mask=n < rows)
        tl.store(stats + total + row, tl.zeros_like(lse), mask=n < rows)
        tl.store(stats + 2 * total + row, tl.where(live, doubt, 0.0), mask=n < rows)
    if known is not None:
        factor, even, at_target = slopes_of(lse, doubt, tl.zeros_like(lse) + 1.0, smoothing, z, classes)
        tl.store(known + n, lse, mask=live)
        tl.store(known + rows + n, factor, mask=live)
        tl.store(known + 2 * rows + n, even, mask=live)
        tl.store(known + 3 * rows + n, at_target, mask=live)


@triton.jit(do_not_specialize=_MOVING)
def recall_kernel(
    x, target, order, count, stats, grad, known, hidden, first, rows, total, classes, depth, smoothing, z,
    x_row, x_column, target_stride, grad_stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `join_kernel` leaves for the gradients, from the stats of an earlier sweep and each row's gradient."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = n < tl.minimum(tl.load(count) - first, rows)
    row = tl.load(order + first + n, mask=live, other=0).to(tl.int64)
    t = tl.load(target + row * target_stride, mask=live, other=0)
    share = tl.load(grad + row * grad_stride, mask=live, other=0.0).to(tl.float32)
    lse = tl.load(stats + row, mask=live, other=0.0) + tl.load(stats + total + row, mask=live, other=0.0)
    lse = tl.where((t >= 0) & (t < classes), lse, float("nan"))
    doubt = tl.load(stats + 2 * total + row, mask=live, other=0.0)
    factor, even, at_target = slopes_of(lse, doubt, share, smoothing, z, classes)
    tl.store(known + n, lse, mask=live)
    tl.store(known + rows + n, factor, mask=live)
    tl.store(known + 2 * rows + n, even, mask=live)
    tl.store(known + 3 * rows + n, at_target, mask=live)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (d < depth)[None, :]
        a = tl.load(x + row[:, None] * x_row + d[None, :].to(tl.int64) * x_column, mask=inside, other=0.0)
        at = n[:, None].to(tl.int64) * depth + d[None, :]
        tl.store(hidden + at, a.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_MOVING)
def slopes_kernel(
    panel, partial, known, target, order, count, first, rows, classes, target_stride, panel_row,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Exponentials against the largest of their tile become slopes, in place."""
    blocks = tl.cdiv(rows, BLOCK_R)
    strip = tl.program_id(0) // blocks
    begin = (tl.program_id(0) % blocks) * BLOCK_R
    left = tl.minimum(tl.load(count) - first, rows)
    if begin >= left:
        return
    n = begin + tl.arange(0, BLOCK_R)
    v = strip * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.load(order + first + n, mask=n < left, other=0).to(tl.int64)
    t = tl.load(target + row * target_stride, mask=n < left, other=-1)
    top = tl.load(partial + strip * rows + n, mask=n < left, other=0.0)
    known += n
    lse = tl.load(known, mask=n < left, other=0.0)
    factor = tl.load(known + rows, mask=n < left, other=0.0)
    even = tl.load(known + 2 * rows, mask=n < left, other=0.0)
    at_target = tl.load(known + 3 * rows, mask=n < left, other=0.0)
    factor *= tl.exp2((tl.where(top == -float("inf"), 0.0, top) - lse) * LOG2E)
    at = panel + n[:, None].to(tl.int64) * panel_row + v[None, :]
    inside = (n < left)[:, None] & (v < classes)[None, :]
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32) * factor[:, None] - even[:, None]
    g = tl.where(v[None, :] == t[:, None], at_target[:, None], g)
    tl.store(at, g.to(panel.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_MOVING, "strip"])
def input_kernel(
    panel, weight, partial, count, first, rows, classes, strip, depth, panel_row, w_row, w_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (splits, rows, depth) = slopes times the layer, each split over `strip` classes."""
    blocks, columns = tl.cdiv(rows, BLOCK_M), tl.cdiv(depth, BLOCK_N)
    split = tl.program_id(0) // (blocks * columns)
    tile = tl.program_id(0) % (blocks * columns)
    begin = (tile % blocks) * BLOCK_M
    left = tl.minimum(tl.load(count) - first, rows)
    if begin >= left:
        return
    n = begin + tl.arange(0, BLOCK_M)
    d = (tile // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end = tl.minimum((split + 1) * strip, classes)
    for start in range(split * strip, end, BLOCK_K):
        v = start + tl.arange(0, BLOCK_K)
        g = load_tile(panel, n, v, panel_row, 1, left, end)
        total = dot(g, load_tile(weight, v, d, w_row, w_column, end, depth), total, PRECISION)
    partial += split.to(tl.int64) * rows * depth
    at = n[:, None].to(tl.int64) * depth + d[None, :]
    tl.store(partial + at, total, mask=(n < left)[:, None] & (d < depth)[None, :])


@triton.jit(do_not_specialize=[*_MOVING, "splits"])
def spread_kernel(
    partial, out, order, count, first, rows, splits, size, depth,
    MEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The splits' sums, `size` elements apart, together to the rows that they belong to; zeros to the others."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    counted = tl.load(count)
    left = tl.minimum(counted - first, rows)
    row = tl.load(order + first + n, mask=n < rows, other=0).to(tl.int64)
    share = 1.0 / tl.maximum(counted, 1).to(tl.float32) if MEAN else 1.0
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (n < left)[:, None] & (d < depth)[None, :]
        at = partial + n[:, None].to(tl.int64) * depth + d[None, :]
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for _ in range(0, splits):
            total += tl.load(at, mask=inside, other=0.0)
            at += size
        to = out + row[:, None] * depth + d[None, :]
        tl.store(to, (total * share).to(out.dtype.element_ty), mask=(n < rows)[:, None] & (d < depth)[None, :])


@triton.jit
def add_tile(out, x, rows, columns, more, row_count, column_count):
    """Stores a tile, or adds it to what is there where there is `more`."""
    at = out + rows[:, None].to(tl.int64) * column_count + columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    if more:
        x += tl.load(at, mask=inside, other=0.0)
    tl.store(at, x, mask=inside)


@triton.jit(do_not_specialize=_MOVING)
def layer_kernel(
    panel, hidden, out, count, first, rows, classes, depth, panel_row,
    MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (classes, depth) = slopes' transpose times the rows, added to what earlier chunks have left there."""
    columns = tl.cdiv(depth, BLOCK_N)
    counted = tl.load(count)
    left = tl.minimum(counted - first, rows)
    if (first > 0) & (left <= 0):
        return
    v = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, left, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        g = load_tile(panel, n, v, panel_row, 1, left, classes)
        total = dot(tl.trans(g), load_tile(hidden, n, d, depth, 1, left, depth), total, PRECISION)
    if MEAN:
        total *= 1.0 / tl.maximum(counted, 1).to(tl.float32)
    # one half after the other: what is added to needs registers beside the sums
    HALF: tl.constexpr = BLOCK_N // 2
    low, high = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    begin = (tl.program_id(0) % columns) * BLOCK_N
    add_tile(out, low, v, begin + tl.arange(0, HALF), first > 0, classes, depth)
    add_tile(out, high, v, begin + HALF + tl.arange(0, HALF), first > 0, classes, depth)


@triton.jit(do_not_specialize=_MOVING)
def bias_kernel(
    panel, out, count, first, rows, classes, panel_row, MEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    """out (classes) = the sum of the slopes' rows, added to what earlier chunks have left there."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    counted = tl.load(count)
    left = tl.minimum(counted - first, rows)
    total = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, left, BLOCK_R):
        total += load_tile(panel, start + tl.arange(0, BLOCK_R), v, panel_row, 1, left, classes).to(tl.float32)
    total = tl.sum(total, 0)
    if MEAN:
        total *= 1.0 / tl.maximum(counted, 1).to(tl.float32)
    if first > 0:
        total += tl.load(out + v, mask=v < classes, other=0.0)
    tl.store(out + v, total, mask=v < classes)


@triton.jit(do_not_specialize=["terms", "pairs"])
def total_kernel(x, out, count, terms, pairs, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of the terms, divided by how many rows there are: `count`, or `pairs` where that is None."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, terms, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < terms, other=0.0)
    result = tl.sum(total, 0)
    if MEAN:
        if count is not None:
            pairs = tl.load(count)
        result = result / pairs.to(tl.float32)
    tl.store(out, result)
