# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exps of scores in one sweep of tiles, and their merge in a fixed order.

A program takes one block of rows over a chunk of key tiles, with the rows' running maxima and sums in registers. What
others must add to, it leaves as a log-sum-exp of its own: rows one for each chunk, columns one for each block of rows,
4 bytes a number, which `finish_kernel` merges; what columns leave is bounded by sweeping groups of rows, after each of
which `fold_kernel` merges what there is. Columns this way cost 4 N M / 128 bytes, against a second sweep's
2 N M D operations: at N = M = 32,768, D = 512 that is 34 MB written and read (20 us) for 1.7 ms. A self-similarity
sweeps the tiles on and above the diagonal: a tile's columns are the rows of its mirror image.
CLIP at that size on an H100: 1.1e12 operations (1.7 ms at 650 TFLOP/s) and two exp2 an element (0.6 ms), which a second
block on the multiprocessor hides; tiles of 128 x 128 read 17 GB from L2 (3 ms at 5.5 TB/s), which bounds the sweep.
"""
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.reference import _contrastive as reference
from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._panel import PANEL_BYTES
from sslkernels.triton._scores import chunked, finite, leave_out, load_rows, pairs, products, row_major, tiles, whole
from sslkernels.triton._tiles import LN2, LOG2E, dot, scalar

# 0 * -inf is NaN; a multiplier this small gives the same sum and keeps an excluded pair excluded
LEAST = tl.constexpr(1e-30)


@triton.jit
def sweep_kernel(
    q, k, scale_tensor, scale, betas, row_lse, row_max, col_lse, col_max,
    n, m, depth, q_row, q_column, k_row, k_column, splits, first, blocks, base, slots, chunk,
    diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER: tl.constexpr,
    TRIANGULAR: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A group of blocks of rows; what block first + i leaves of its columns goes to slot base + i of `slots`.

    UNIT: of the rows' log-sum-exps and maxima, LN2 where they are final, 1 where they are merged.
    """
    i, part, begin, end = chunked(tl.program_id(0), blocks, tl.cdiv(m, BLOCK_M), splits, chunk, GROUP)
    slot = base + i
    i += first
    if TRIANGULAR:
        begin = tl.maximum(begin, i * (BLOCK_N // BLOCK_M))
    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    scale2 = scalar(scale_tensor, scale) * LOG2E
    if WHOLE:
        a = load_rows(q, rows, n, 0, depth, q_row, q_column, BLOCK_D, EVEN)
    high = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    sums = ()
    for _ in tl.static_range(len(betas)):
        sums += (tl.zeros((BLOCK_N,), tl.float32),)
    for j in range(begin, end):
        columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
        if WHOLE:
            b = load_rows(k, columns, m, 0, depth, k_row, k_column, BLOCK_D, EVEN)
            s = dot(a, tl.trans(b), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        else:
            s = products(
                q, k, rows, columns, n, m, depth, q_row, q_column, k_row, k_column,
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
            )  # fmt: skip
        s = leave_out(
            s * scale2, rows, columns, n, m,
            diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER,
        )  # fmt: skip
        higher = tl.maximum(high, tl.max(s, 1))
        added = ()
        if col_lse is None:
            for channel in tl.static_range(len(betas)):
                beta = tl.maximum(betas[channel], LEAST)
                added += (tl.sum(tl.exp2((s - finite(higher)[:, None]) * beta), 1),)
        else:
            top = tl.max(s, 0)
            stored = columns < m
            if TRIANGULAR:
                stored = stored & (columns >= (i + 1) * BLOCK_N)
            for channel in tl.static_range(len(betas)):
                new, lse = both_sums(s, higher, top, tl.maximum(betas[channel], LEAST), WHOLE)
                added += (new,)
                at = (channel * slots + slot).to(tl.int64) * m + columns
                tl.store(col_lse + at, lse, mask=stored)
                if channel == 0 and col_max is not None:
                    tl.store(col_max + at, tl.where(lse != lse, lse, top), mask=stored)
        sums = rebased(sums, added, high, higher, betas)
        high = higher
    for channel in tl.static_range(len(betas)):
        lse = finite(high) * tl.maximum(betas[channel], LEAST) + tl.log2(sums[channel])
        at = (channel * splits + part).to(tl.int64) * n + rows
        tl.store(row_lse + at, lse * UNIT, mask=rows < n)
        if channel == 0:
            # a maximum may drop a NaN, a sum never does
            tl.store(row_max + at, tl.where(lse != lse, lse, high * UNIT), mask=rows < n)


@triton.jit
def both_sums(s, higher, top, beta, SHARE: tl.constexpr):
    """Sums over rows of 2^(beta (s - higher)), and log-sum-exps of columns, whose maxima are `top`.

    One exp2 an element serves both where no column is so far below the rows that it would underflow. SHARE only with
    few features: where the products hide the second exp2, the registers of the choice cost more than it saves.
    """
    highest = tl.max(higher, 0)
    shared = False
    if SHARE:
        lowest = tl.min(tl.where(top == -float("inf"), float("inf"), top), 0)
        shared = (highest - lowest) * beta < 100.0
    if not SHARE:
        new, lse = two_sums(s, higher, top, beta)
    elif shared:
        e = tl.exp2((s - finite(higher)[:, None]) * beta)
        new = tl.sum(e, 1)
        column = tl.sum(e * tl.exp2((higher - finite(highest)) * beta)[:, None], 0)
        lse = finite(highest) * beta + tl.log2(column)
    else:  # an infinity or a NaN as well
        new, lse = two_sums(s, higher, top, beta)
    return new, lse


@triton.jit
def two_sums(s, higher, top, beta):
    new = tl.sum(tl.exp2((s - finite(higher)[:, None]) * beta), 1)
    column = tl.sum(tl.exp2((s - finite(top)[None, :]) * beta), 0)
    return new, finite(top) * beta + tl.log2(column)


@triton.jit
def rebased(sums, added, high, higher, betas):
    out = ()
    for channel in tl.static_range(len(betas)):
        beta = tl.maximum(betas[channel], LEAST)
        out += (sums[channel] * tl.exp2((high - finite(higher)) * beta) + added[channel],)
    return out


@triton.jit
def swept(x, first, blocks, base, TRIANGULAR: tl.constexpr, TILE: tl.constexpr):
    """How many slots of a column x hold something, after a group of blocks of rows."""
    if TRIANGULAR:
        # those before the row of the same number have swept it as a column
        blocks = tl.minimum(tl.maximum(x // TILE - first, 0), blocks)
    return base + blocks + tl.zeros_like(x)


@triton.jit
def fold_kernel(
    part, max_part, m, first, blocks, base, slots,
    CHANNELS: tl.constexpr, TRIANGULAR: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges what a group of blocks of rows has left of the columns into slot 0, which is part of it."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = swept(columns, first, blocks, base, TRIANGULAR, TILE)
    for channel in tl.static_range(CHANNELS):
        high = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        high, total = merge(part, channel * slots, count, columns, m, high, total, SLOTS)
        at = (channel * slots + tl.zeros_like(columns)).to(tl.int64) * m + columns
        tl.store(part + at, finite(high) + tl.log2(total), mask=columns < m)
    if max_part is not None:
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        tl.store(max_part + columns, merge_max(max_part, count, columns, m, top, SLOTS), mask=columns < m)


@triton.jit
def finish_kernel(
    q, k, scale_tensor, scale, row_part, row_max_part, col_part, col_max_part, row_lse, row_max, col_lse, positive,
    n, m, depth, q_row, q_column, k_row, k_column, splits, first, blocks, base, slots, offset,
    CHANNELS: tl.constexpr, TRIANGULAR: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges what `sweep_kernel` left, rows first, columns in the programs after; positives beside the rows."""
    program = tl.program_id(0)
    row_programs = tl.cdiv(n, BLOCK)
    if program < row_programs:
        rows = program * BLOCK + tl.arange(0, BLOCK)
        if row_part is not None:
            mirrored = swept(rows, first, blocks, base, TRIANGULAR, TILE)
            for channel in tl.static_range(CHANNELS):
                high = tl.full((BLOCK,), -float("inf"), tl.float32)
                total = tl.zeros((BLOCK,), tl.float32)
                high, total = merge(row_part, channel * splits, splits, rows, n, high, total, SLOTS)
                if TRIANGULAR:
                    high, total = merge(col_part, channel * slots, mirrored, rows, m, high, total, SLOTS)
                lse = (finite(high) + tl.log2(total)) * LN2
                tl.store(row_lse + channel * n + rows, lse, mask=rows < n)
                if channel == 0:
                    top = tl.full((BLOCK,), -float("inf"), tl.float32)
                    top = merge_max(row_max_part, splits, rows, n, top, SLOTS)
                    if TRIANGULAR:
                        top = merge_max(col_max_part, mirrored, rows, m, top, SLOTS)
                    tl.store(row_max + rows, tl.where(lse != lse, lse, top * LN2), mask=rows < n)
        if positive is not None:
            partners = (rows + offset) % m
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, depth, BLOCK_D):
                a = load_rows(q, rows, n, start, depth, q_row, q_column, BLOCK_D, False).to(tl.float32)
                b = load_rows(k, partners, m, start, depth, k_row, k_column, BLOCK_D, False).to(tl.float32)
                total += tl.sum(a * b, 1)
            tl.store(positive + rows, total * scalar(scale_tensor, scale), mask=rows < n)
    else:
        if col_lse is not None:
            columns = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
            count = swept(columns, first, blocks, base, False, TILE)
            for channel in tl.static_range(CHANNELS):
                high = tl.full((BLOCK,), -float("inf"), tl.float32)
                total = tl.zeros((BLOCK,), tl.float32)
                high, total = merge(col_part, channel * slots, count, columns, m, high, total, SLOTS)
                tl.store(col_lse + channel * m + columns, (finite(high) + tl.log2(total)) * LN2, mask=columns < m)


@triton.jit
def load_slots(part, first, start, slots, x, count, SLOTS: tl.constexpr):
    slot = start + tl.arange(0, SLOTS)[:, None]
    mask = (slot < slots) & (x < count)[None, :]
    return tl.load(part + (first + slot).to(tl.int64) * count + x[None, :], mask=mask, other=-float("inf"))


@triton.jit
def merge(part, first, slots, x, count, high, total, SLOTS: tl.constexpr):
    """Running (maxima, sums) of the log-sum-exps part[first + slot, x] of slot < slots (also: of each x), in order."""
    for start in range(0, tl.max(slots + tl.zeros_like(x), 0), SLOTS):
        value = load_slots(part, first, start, slots, x, count, SLOTS)
        higher = tl.maximum(high, tl.max(value, 0))
        reference = finite(higher)
        total = total * tl.exp2(high - reference) + tl.sum(tl.exp2(value - reference[None, :]), 0)
        high = higher
    return high, total


@triton.jit
def merge_max(part, slots, x, count, high, SLOTS: tl.constexpr):
    for start in range(0, tl.max(slots + tl.zeros_like(x), 0), SLOTS):
        high = tl.maximum(high, tl.max(load_slots(part, 0, start, slots, x, count, SLOTS), 0))
    return high


def split(x, row_blocks: int, tiles: int, size: int, most: int = 16) -> tuple[int, int]:
    """(parts, tiles in each) of a row of tiles: two programs a multiprocessor, or `most` tiles each.

    `size`: bytes that one part of all rows takes; more tiles in each, where the parts would not fit their memory.
    """
    chunk = min(max(row_blocks * tiles // (2 * multiprocessors(x)), 1), most)
    chunk = max(chunk, cdiv(tiles, max(PANEL_BYTES // size, 1)))
    return cdiv(tiles, chunk), chunk


def sweep(q, k, scale_tensor, scale, rules, betas, columns, offset, triangular=False):
    """(row_lse, col_lse, positive, row_max) as the schema of similarity_logsumexp says."""
    q, k = row_major(q, k)
    (n, depth), m, channels = q.shape, k.shape[0], len(betas)
    empty = lambda *sizes: torch.empty(sizes, dtype=torch.float32, device=q.device)  # noqa: E731
    row, top, positive = empty(channels, n), empty(n), empty(0 if offset is None else n)
    col = empty(channels, m) if columns else empty(0)
    if n == 0 or m == 0:
        return row.fill_(-torch.inf), col.fill_(-torch.inf), positive, top.fill_(-torch.inf)
    fits = whole("scores", q, k)
    tile = tiles("scores", q, k, fits=fits, busy=channels > 1 or rules.vectors() or (triangular and not fits))
    row_blocks, column_blocks = cdiv(n, tile["BLOCK_N"]), cdiv(m, tile["BLOCK_M"])
    splits, chunk = split(q, row_blocks, column_blocks, 4 * (channels + 1) * n)
    merged = splits > 1 or triangular
    row_part = empty(channels, splits, n) if merged else None
    top_part = empty(splits, n) if merged else None
    by_columns = columns or triangular
    group = min(max(PANEL_BYTES // (4 * (channels + triangular) * m), 1), row_blocks) if by_columns else row_blocks
    base = int(group < row_blocks)  # slot 0 holds what earlier groups have left
    slots = base + group
    col_part = empty(channels, slots, m) if by_columns else None
    col_top_part = empty(slots, m) if triangular else None
    sizes = n, m, depth, *q.stride(), *k.stride(), splits
    finish = shape("merge", q)
    for first in range(0, row_blocks, group):
        place = first, min(group, row_blocks - first), base, slots
        launch(
            sweep_kernel, (place[1] * splits,), q, k, scale_tensor, scale, tuple(betas),
            row_part if merged else row, top_part if merged else top, col_part, col_top_part, *sizes, *place, chunk,
            *rules, TRIANGULAR=triangular, UNIT=1.0 if merged else LN2.value, **tile,
        )  # fmt: skip
        if first + group < row_blocks:
            if first == 0:
                for part in (col_part, col_top_part):
                    if part is not None:
                        part[..., 0, :] = -torch.inf
            launch(
                fold_kernel, (cdiv(m, finish["BLOCK"]),), col_part, col_top_part, m, *place,
                CHANNELS=channels, TRIANGULAR=triangular, TILE=tile["BLOCK_N"], **finish,
            )  # fmt: skip
    if merged or columns or offset is not None:
        programs = cdiv(n, finish["BLOCK"]) + (cdiv(m, finish["BLOCK"]) if columns else 0)
        launch(
            finish_kernel, (programs,), q, k, scale_tensor, scale, row_part, top_part, col_part, col_top_part,
            row, top, col if columns else None, None if offset is None else positive,
            *sizes, *place, offset, CHANNELS=channels, TRIANGULAR=triangular, TILE=tile["BLOCK_N"], **finish,
        )  # fmt: skip
    return row, col, positive, top


def similarity_logsumexp(
    q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask, differ,
    scales, columns, keep_scores, offset,
):  # fmt: skip
    rules = pairs(diagonal, period, query_groups, key_groups, key_mask, differ, n=q.shape[0], m=k.shape[0])
    out = sweep(q, k, scale_tensor, scale, rules, scales, columns, offset)
    if not keep_scores:
        return *out, _no_scores(q)
    arguments = q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask, differ, scales
    return *out, reference.lse_forward(*arguments, False, True, None)[-1]


def self_similarity_logsumexp(
    z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, scales, keep_scores, offset
):
    m = z.shape[0]
    rules = pairs(diagonal, period, groups, groups, key_mask, differ, n=m, m=m, query_mask=key_mask)
    row, _, *rest = sweep(z, z, scale_tensor, scale, rules, scales, False, offset, triangular=True)
    if not keep_scores:
        return row, *rest, _no_scores(z)
    arguments = z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, scales, True, None
    return row, *rest, reference.self_lse_forward(*arguments)[-1]


def _no_scores(like):
    """No backward on a GPU reads scores; who asks for them gets the reference's."""
    return torch.empty(0, dtype=torch.float32, device=like.device)
