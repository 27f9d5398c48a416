# SPDX-License-Identifier: Apache-2.0
"""Row log-sum-exps with the softmax-weighted sum of keys, one sweep: attention whose values are its keys.

Where a block's sum of keys fits the registers (the table's row "attention_whole"), scores and sum share the keys'
tiles; for few rows the keys are split among programs, whose results `attention_merge_kernel` weighs in a fixed order.
Beyond, the log-sum-exps are swept first and the softmax passes through a bounded panel: three products instead of two.
MoCo, N = 256 against M = 65,536 keys, D = 128: 8.6e9 operations (15 us) and 17 MB of keys (6 us) on an H100, beside
17 MB of parts written and read within L2.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._gradients import NO_PARTNER, NO_SIDE, Side, Sweep, split_rarely, unit_of
from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._lse import sweep
from sslkernels.triton._scores import chunked, finite, leave_out, load_rows, pairs, row_major, tiles, whole
from sslkernels.triton._tiles import LN2, LOG2E, dot, scalar

# weights reach from 2^14 down, not from 1: float16 is exact to 2^-14 and the row's sum takes it out again
SHIFT = tl.constexpr(14.0)


@triton.jit
def attention_kernel(
    q, k, scale_tensor, scale, row_lse, row_max, context,
    n, m, depth, q_row, q_column, k_row, k_column, splits, chunk,
    diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of each part of the keys: log-sum-exps, maxima, and the sum of its keys weighted by its own softmax."""
    i, part, begin, end = chunked(
        tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), splits, chunk, GROUP
    )  # fmt: skip
    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    scale2 = scalar(scale_tensor, scale) * LOG2E
    a = load_rows(q, rows, n, 0, depth, q_row, q_column, BLOCK_D, EVEN)
    high = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for j in range(begin, end):
        columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
        b = load_rows(k, columns, m, 0, depth, k_row, k_column, BLOCK_D, EVEN)
        s = dot(a, tl.trans(b), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        s = leave_out(
            s * scale2, rows, columns, n, m,
            diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER,
        )  # fmt: skip
        higher = tl.maximum(high, tl.max(s, 1))
        reference = finite(higher)
        w = tl.exp2(s - (reference - SHIFT)[:, None])
        shrink = tl.exp2(high - reference)
        weight = weight * shrink + tl.sum(w, 1)
        if a.dtype == b.dtype:
            w = w.to(b.dtype)
        total = dot(w, b, total * shrink[:, None], PRECISION)
        high = higher
    lse = (finite(high) - SHIFT + tl.log2(weight)) * LN2
    at = part * n + rows
    tl.store(row_lse + at, lse, mask=rows < n)
    tl.store(row_max + at, tl.where(lse != lse, lse, high * LN2), mask=rows < n)
    d = tl.arange(0, BLOCK_D)
    # a row without a pair has no keys to weigh
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    stored = (rows < n)[:, None] & (d < depth)[None, :]
    tl.store(context + at.to(tl.int64)[:, None] * depth + d[None, :], total, mask=stored)


@triton.jit
def attention_merge_kernel(
    lse_part, max_part, context_part, row_lse, row_max, context, n, depth, splits,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the parts of a block of rows and of features, in their order."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    stored = (rows < n)[:, None] & (d < depth)[None, :]
    high = tl.full((BLOCK,), -float("inf"), tl.float32)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for part in range(0, splits):
        at = part * n + rows
        value = tl.load(lse_part + at, mask=rows < n, other=-float("inf")) * LOG2E
        top = tl.maximum(top, tl.load(max_part + at, mask=rows < n, other=-float("inf")))
        here = tl.load(context_part + at.to(tl.int64)[:, None] * depth + d[None, :], mask=stored, other=0.0)
        higher = tl.maximum(high, value)
        reference = finite(higher)
        shrink, share = tl.exp2(high - reference), tl.exp2(value - reference)
        weight = weight * shrink + share
        total = total * shrink[:, None] + here * share[:, None]
        high = higher
    lse = (finite(high) + tl.log2(weight)) * LN2
    if tl.program_id(1) == 0:
        tl.store(row_lse + rows, lse, mask=rows < n)
        tl.store(row_max + rows, tl.where(lse != lse, lse, top), mask=rows < n)
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(context + rows[:, None].to(tl.int64) * depth + d[None, :], total, mask=stored)


def similarity_row_attention(
    q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask, differ
):  # fmt: skip
    q, k = row_major(q, k)
    (n, depth), m = q.shape, k.shape[0]
    rules = pairs(diagonal, period, query_groups, key_groups, key_mask, differ, n=n, m=m)
    empty = lambda *sizes: torch.empty(sizes, dtype=torch.float32, device=q.device)  # noqa: E731
    context = empty(n, depth)
    if n == 0 or m == 0:
        return *(empty(n).fill_(-torch.inf) for _ in range(2)), context.zero_()
    if not whole("attention", q, k):
        row, _, _, top = sweep(q, k, scale_tensor, scale, rules, (1.0,), False, None)
        side = Side(row)
        unit = unit_of(q, k, (1.0,), side, NO_SIDE)
        weights = Sweep(q, k, (scale_tensor, scale), (1.0,), unit, side, NO_SIDE, NO_PARTNER, rules)
        weights.multiply(context)
        return row[0], top, context
    tile = tiles("attention", q, k, fits=True)
    row_blocks = cdiv(n, tile["BLOCK_N"])
    splits, chunk = split_rarely(q, row_blocks, cdiv(m, tile["BLOCK_M"]))
    row, top = empty(n), empty(n)
    parts = (row, top, context) if splits == 1 else (empty(splits, n), empty(splits, n), empty(splits, n, depth))
    sizes = n, m, depth, *q.stride(), *k.stride(), splits, chunk
    launch(attention_kernel, (row_blocks * splits,), q, k, scale_tensor, scale, *parts, *sizes, *rules, **tile)
    if splits > 1:
        block = shape("complete", q)
        grid = cdiv(n, block["BLOCK"]), max(cdiv(depth, block["BLOCK_D"]), 1)
        launch(attention_merge_kernel, grid, *parts, row, top, context, n, depth, splits, **block)
    return row, top, context
