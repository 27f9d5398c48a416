# SPDX-License-Identifier: Apache-2.0
"""Kernels of nearest and topk_similarity: tiles of scores that no memory sees, each searched in registers.

A score becomes an int32 that sorts as it does, NaN above all, and with its key's place, the smaller the larger, 64 bits
that no two keys share: so equal scores go to the smaller index, and parts of the keys, searched by different programs,
merge by a maximum, in any order to the same bits.

An H100 with bfloat16: 8 integer operations a score, which hide behind a product of D >= 256; 65,536 x 65,536 at D = 768
are 6.6e12 operations, 13 ms at 500e12 a second. The k best cost about k ln(M / k) more rounds over a tile for its rows.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._scores import load_rows, products
from sslkernels.triton._tiles import dot

NOTHING = tl.constexpr(-(2**31))  # below the order of any score: no key, or one that is left out
UNORDERED = tl.constexpr(2**31 - 1)
COSINE_EPS = tl.constexpr(1e-12)
SAMPLE = tl.constexpr(31)  # keys that the centre is taken from, as the reference's


@triton.jit
def order_of(s):
    """An int32 that rises with s: -0.0 equals 0.0, and NaN is above all."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    return tl.where(s == s, tl.where(bits < 0, bits ^ UNORDERED, bits), UNORDERED)


@triton.jit
def score_of(order):
    return tl.where(order < 0, order ^ UNORDERED, order).to(tl.float32, bitcast=True)


@triton.jit
def packed(order, index):
    return (order.to(tl.int64) << 32) | (4294967295 - index.to(tl.int64))


@triton.jit
def middle(x, count):
    """The lower median of each row's first numbers: of the `count` that are below infinity's place after sorting."""
    place = tl.maximum(count - 1, 0) // 2
    ordered = tl.sort(x, 1)
    slot = tl.arange(0, x.shape[1])
    return tl.sum(tl.where(slot[None, :] == place[:, None], ordered, 0.0), 1)


@triton.jit
def centre_kernel(k, centre, shifted, m, depth, row_stride, column_stride, BLOCK_D: tl.constexpr):
    """Where to count l2 from: the median of a sample of keys, the origin unless that is four times as far from them."""
    step = tl.cdiv(m, SAMPLE)
    slot = tl.arange(0, SAMPLE + 1)
    row = slot.to(tl.int64) * step
    near = tl.zeros((SAMPLE + 1,), tl.float32)
    far = tl.zeros((SAMPLE + 1,), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < depth)[:, None] & (row < m)[None, :]
        at = k + d[:, None].to(tl.int64) * column_stride + row[None, :] * row_stride
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        known = inside & (x == x)
        count = tl.sum(known.to(tl.int32), 1)
        c = middle(tl.where(known, x, float("inf")), count)
        c = tl.where((count > 0) & (tl.abs(c) < float("inf")), c, 0.0)
        tl.store(centre + d, c, mask=d < depth)
        gap = tl.where(inside, x - c[:, None], 0.0)
        near += tl.sum(gap * gap, 0)
        far += tl.sum(x * x, 0)
    # rows side by side: distances from the centre, and from the origin
    both = tl.trans(tl.join(near, far))
    known = (row < m)[None, :] & (both == both)
    count = tl.sum(known.to(tl.int32), 1)
    both = middle(tl.where(known, both, float("inf")), count)
    side = tl.arange(0, 2)
    close = tl.sum(tl.where(side == 0, 4.0 * both, 0.0), 0) <= tl.sum(tl.where(side == 1, both, 0.0), 0)
    close = close & (tl.min(count, 0) > 0)
    tl.store(shifted, close.to(tl.int32))
    tl.debug_barrier()
    if close == 0:
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            tl.store(centre + d, tl.zeros((BLOCK_D,), tl.float32), mask=d < depth)


@triton.jit
def length_of(x, row, inside, depth, row_stride, column_stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x| of rows, at least COSINE_EPS, with no square that overflows or underflows."""
    largest = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at = x + row[:, None] * row_stride + d[None, :].to(tl.int64) * column_stride
        value = tl.load(at, mask=inside[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    largest = tl.max(largest, 1)
    unit = tl.where(largest > 0, largest, 1.0)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at = x + row[:, None] * row_stride + d[None, :].to(tl.int64) * column_stride
        value = tl.load(at, mask=inside[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32) / unit[:, None]
        total += value * value
    length = tl.sqrt_rn(tl.sum(total, 1)) * unit
    return tl.where(length < COSINE_EPS, COSINE_EPS, length)


@triton.jit
def weights_kernel(
    k, centre, weights, m, depth, row_stride, column_stride,
    METRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each key: one over its length, or half its squared distance from the centre."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < m
    if METRIC == "cosine":
        weight = 1.0 / length_of(k, row, inside, depth, row_stride, column_stride, BLOCK_R, BLOCK_D)
    else:
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            there = inside[:, None] & (d < depth)[None, :]
            at = k + row[:, None] * row_stride + d[None, :].to(tl.int64) * column_stride
            c = tl.load(centre + d, mask=d < depth, other=0.0)
            gap = tl.where(there, tl.load(at, mask=there, other=0.0).to(tl.float32) - c[None, :], 0.0)
            total += gap * gap
        weight = tl.sum(total, 1) * 0.5
    tl.store(weights + row, weight, mask=inside)


@triton.jit
def wide_products(
    q, k, centre, weights, i, j, n, m, depth, q_row, q_column, k_row, k_column, METRIC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<q, k> of float32 rows: counted from the centre, or the keys brought to unit length."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if METRIC == "cosine":
        weight = tl.load(weights + j, mask=j < m, other=0.0)
    for start in range(0, depth, BLOCK_D):
        a = load_rows(q, i, n, start, depth, q_row, q_column, BLOCK_D, EVEN).to(tl.float32)
        b = load_rows(k, j, m, start, depth, k_row, k_column, BLOCK_D, EVEN).to(tl.float32)
        if METRIC == "cosine":
            b *= weight[:, None]
        else:
            d = start + tl.arange(0, BLOCK_D)
            c = tl.load(centre + d, mask=d < depth, other=0.0)[None, :]
            a -= c
            b -= c
        total = dot(a, tl.trans(b), total, PRECISION)
    return total


@triton.jit
def orders(
    q, k, centre, shifted, weights, i, j, n, m, depth, q_row, q_column, k_row, k_column,
    METRIC: tl.constexpr, NARROW: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The order of a tile's scores. NARROW: 16-bit rows of one dtype, whose products are exact as they are, but for l2
    from another centre than the origin, where their differences have more than 16 bits."""
    if METRIC == "dot" or (METRIC == "cosine" and NARROW):
        s = products(
            q, k, i, j, n, m, depth, q_row, q_column, k_row, k_column, BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION
        )
    elif METRIC == "l2" and NARROW:
        if tl.load(shifted) == 0:
            s = products(
                q, k, i, j, n, m, depth, q_row, q_column, k_row, k_column, BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION
            )
        else:
            s = wide_products(
                q, k, centre, weights, i, j, n, m, depth, q_row, q_column, k_row, k_column, METRIC,
                BLOCK_N, BLOCK_M, BLOCK_D // 2, EVEN, PRECISION,
            )  # fmt: skip
    else:
        s = wide_products(
            q, k, centre, weights, i, j, n, m, depth, q_row, q_column, k_row, k_column, METRIC,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
    if METRIC == "cosine" and NARROW:
        s *= tl.load(weights + j, mask=j < m, other=0.0)[None, :]
    if METRIC == "l2":
        # a key at an infinite distance may have met an infinity of the other sign
        half = tl.load(weights + j, mask=j < m, other=0.0)[None, :]
        s = tl.where(half == float("inf"), -float("inf"), s - half)
    kept = (j < m)[None, :]
    if EXCLUDE:
        kept = kept & (j[None, :] != i[:, None])
    return tl.where(kept, order_of(s), NOTHING)


@triton.jit
def nearest_kernel(
    q, k, centre, shifted, weights, best, n, m, depth, part, q_row, q_column, k_row, k_column,
    METRIC: tl.constexpr, NARROW: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """best (splits, n): the best key of each query among each split's `part`."""
    blocks = tl.cdiv(n, BLOCK_N)
    split = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), NOTHING, tl.int32)
    at = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(split * part, tl.minimum((split + 1) * part, m), BLOCK_M):
        j = (start + tl.arange(0, BLOCK_M)).to(tl.int32)
        order = orders(
            q, k, centre, shifted, weights, i, j, n, m, depth, q_row, q_column, k_row, k_column,
            METRIC, NARROW, EXCLUDE, BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
        highest = tl.max(order, 1)
        better = highest > top
        # ever rarer as keys go by
        if tl.max(better.to(tl.int32), 0) > 0:
            index = tl.min(tl.where(order == highest[:, None], j[None, :], UNORDERED), 1)
            at = tl.where(better, index, at)
            top = tl.where(better, highest, top)
    tl.store(best + split.to(tl.int64) * n + i, packed(top, at), mask=i < n)


@triton.jit
def topk_kernel(
    q, k, centre, shifted, weights, best, n, m, depth, part, splits, width, q_row, q_column, k_row, k_column,
    METRIC: tl.constexpr, NARROW: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """best (n, splits, width): the best keys of each query among each split's `part`, in no order.

    A tile gives its best score of every row in turn, as long as any beats the worst that its row has kept.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    split = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, SLOTS)
    # an empty slot is the worst there is, and no two are equal; one that is not used is never the worst
    empty = tl.where(slot < width, packed(tl.full((SLOTS,), NOTHING, tl.int32), slot), 9223372036854775807)
    kept = tl.zeros((BLOCK_N, 1), tl.int64) + empty[None, :]
    worst = tl.min(kept, 1)
    for start in range(split * part, tl.minimum((split + 1) * part, m), BLOCK_M):
        j = (start + tl.arange(0, BLOCK_M)).to(tl.int32)
        order = orders(
            q, k, centre, shifted, weights, i, j, n, m, depth, q_row, q_column, k_row, k_column,
            METRIC, NARROW, EXCLUDE, BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
        highest = tl.max(order, 1)
        better = highest > (worst >> 32).to(tl.int32)
        while tl.max(better.to(tl.int32), 0) > 0:
            index = tl.min(tl.where(order == highest[:, None], j[None, :], UNORDERED), 1)
            found = (kept == worst[:, None]) & better[:, None]
            kept = tl.where(found, packed(highest, index)[:, None], kept)
            worst = tl.min(kept, 1)
            order = tl.where((j[None, :] == index[:, None]) & better[:, None], NOTHING, order)
            highest = tl.max(order, 1)
            better = highest > (worst >> 32).to(tl.int32)
    at = (i[:, None].to(tl.int64) * splits + split) * width + slot[None, :]
    tl.store(best + at, kept, mask=(i < n)[:, None] & (slot < width)[None, :])


@triton.jit
def panel_kernel(
    q, k, centre, shifted, weights, panel, n, m, depth, first, rows, begin, end, panel_row,
    q_row, q_column, k_row, k_column, METRIC: tl.constexpr, NARROW: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """panel (rows, end - begin): `packed` of the queries from `first` on and of these keys."""
    blocks = tl.cdiv(rows, BLOCK_N)
    r = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = begin + (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    order = orders(
        q, k, centre, shifted, weights, first + r, j, n, m, depth, q_row, q_column, k_row, k_column,
        METRIC, NARROW, EXCLUDE, BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
    )  # fmt: skip
    at = r[:, None].to(tl.int64) * panel_row + (j - begin)[None, :]
    index = tl.zeros_like(order) + j[None, :]
    tl.store(panel + at, packed(order, index), mask=(r < rows)[:, None] & (j < end)[None, :])


@triton.jit
def values_kernel(
    q, k, best, values, indices, again, total, width, m, depth, q_row, q_column, k_row, k_column,
    METRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Values and indices (total,) of what was found; for l2 from the differences of the rows, which go `again`, packed,
    where they have yet to be sorted. METRIC "done": values of l2 that have been."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < total
    found = tl.load(best + r, mask=inside, other=0)
    index = tl.minimum(4294967295 - (found & 4294967295), m - 1)
    value = score_of((found >> 32).to(tl.int32))
    row = r // width
    if METRIC == "done":
        value = 0.0 - value
    if METRIC == "cosine":
        value = value / length_of(q, row, inside, depth, q_row, q_column, BLOCK_R, BLOCK_D)
    if METRIC == "l2":
        sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            there = inside[:, None] & (d < depth)[None, :]
            column = d[None, :].to(tl.int64)
            a = tl.load(q + row[:, None] * q_row + column * q_column, mask=there, other=0.0).to(tl.float32)
            b = tl.load(k + index[:, None] * k_row + column * k_column, mask=there, other=0.0).to(tl.float32)
            sums += (a - b) * (a - b)
        value = tl.sum(sums, 1)
    if again is not None:
        tl.store(again + r, packed(order_of(0.0 - value), index), mask=inside)
    else:
        tl.store(values + r, value, mask=inside)
        tl.store(indices + r, index, mask=inside)
