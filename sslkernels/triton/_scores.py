# SPDX-License-Identifier: Apache-2.0
"""Tiles of scores s_ij = scale <q_i, k_j>, in units of log 2, and the rules that leave pairs out.

A tile is recomputed wherever it is needed: 2 BLOCK_N BLOCK_M D operations on tensor cores against BLOCK_N BLOCK_M exp2,
which a multiprocessor makes 16 of in a cycle: at D = 128 both cost an H100 the same, so nothing else may cost much. An
excluded pair costs a comparison and a selection: what a rule needs of rows and columns is made once for a tile's edges.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.triton._launch import architecture, shape
from sslkernels.triton._tiles import dot, precision


class Pairs(NamedTuple):
    """The rules of `Exclude` as arguments of a kernel, in this order; what is None costs nothing in it.

    Rows are left out by `query_mask` as columns by `key_mask`; a self-similarity has one mask on both sides.
    """

    diagonal: int | None
    period: int | None
    query_groups: Tensor | None
    key_groups: Tensor | None
    query_mask: Tensor | None
    key_mask: Tensor | None
    DIFFER: bool

    def vectors(self) -> bool:
        """Whether a tile loads something beside features."""
        return self.key_groups is not None or self.key_mask is not None or self.query_mask is not None

    def transposed(self) -> Pairs:
        """The rules of the pairs (j, i)."""
        diagonal = self.diagonal
        if diagonal is not None:
            diagonal = -diagonal if self.period is None else -diagonal % self.period
        groups, masks = (self.key_groups, self.query_groups), (self.key_mask, self.query_mask)
        return Pairs(diagonal, self.period, *groups, *masks, self.DIFFER)


def pairs(diagonal, period, query_groups, key_groups, key_mask, differ, *, n: int, m: int, query_mask=None) -> Pairs:
    """From the six fields of `Exclude`, for n queries and m keys. Numbers leave it small enough for 32 bits."""
    if diagonal is not None and period is not None:
        diagonal %= period
        if period >= n + m - 1:  # only one diagonal of the matrix is congruent
            diagonal, period = diagonal if diagonal < m else diagonal - period, None
    if diagonal is not None and period is None and not -n < diagonal < m:
        diagonal = None
    if query_groups is None or key_groups is None:
        query_groups = key_groups = None
    vectors = [x if x is None else x.contiguous() for x in (query_groups, key_groups, query_mask, key_mask)]
    return Pairs(diagonal, period, vectors[0], vectors[1], vectors[2], vectors[3], bool(differ))


def row_major(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Features row by row in memory: a column-major side (a queue's transpose) is copied, not read 2 bytes a time."""
    first, second = (x.contiguous() if x.stride(0) == 1 and x.stride(1) != 1 else x for x in (q, k))
    return first, first if k is q else second


def whole(kind: str, q: Tensor, k: Tensor) -> bool:
    """Whether a tile has all of its rows' features at once."""
    return q.shape[1] <= shape(f"{kind}_whole", q, k)["BLOCK_D"]


def tiles(kind: str, q: Tensor, k: Tensor, *, fits: bool | None = None, busy: bool = False) -> dict[str, Any]:
    """The launch shape of a sweep over tiles of scores, from the rows `kind` and `kind`_whole of the table.

    WHOLE: the features fit BLOCK_D (`fits`, if that is known). EVEN: they fill what is read of them. `busy` as below.
    """
    fits, depth = whole(kind, q, k) if fits is None else fits, q.shape[1]
    found = shape(f"{kind}_whole" if fits else kind, q, k)
    block = max(triton.next_power_of_2(depth), 16) if fits else found["BLOCK_D"]
    even = depth > 0 and depth % block == 0
    found = unbounded(found, q, k, busy or not even)
    if q.dtype != k.dtype and kind in ("attention", "gradient"):
        # what the second product converts takes registers of its own
        found = found | {"BLOCK_N": 32}
    return found | {"BLOCK_D": block, "WHOLE": fits, "EVEN": even, "PRECISION": precision()}


def unbounded(tile: dict[str, Any], q: Tensor, k: Tensor, busy: bool) -> dict[str, Any]:
    """The launch shape without its bound of registers, or of half the columns, where there is more to keep than scores.

    `busy` says so; so do rows that are not read 16 bytes at a time, as these come by way of registers. It would spill.
    """
    if not busy:
        busy = any(x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 for x in (q, k))
    if not busy:
        return tile
    if "maxnreg" in tile:
        return {name: value for name, value in tile.items() if name != "maxnreg"}
    half = tile | {"BLOCK_M": max(tile["BLOCK_M"] // 2, 16)}
    if architecture(q) == "gfx942":  # 4 warps of 64 threads have all registers there, 8 have half as many each
        return half if tile["num_warps"] == 4 else tile
    return half | {"num_warps": 8}


@triton.jit
def load_rows(x, rows, row_count, start, depth, row_stride, column_stride, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """x[rows, start : start + BLOCK_D]; zeros right of `depth` (EVEN: no such), the last row again below it."""
    inside = tl.minimum(rows, row_count - 1)
    d = start + tl.arange(0, BLOCK_D)
    offsets = inside[:, None].to(tl.int64) * row_stride + d[None, :].to(tl.int64) * column_stride
    if EVEN:
        return tl.load(x + offsets)
    return tl.load(x + offsets, mask=(d < depth)[None, :], other=0.0)


@triton.jit
def products(
    q, k, rows, columns, n, m, depth, q_row, q_column, k_row, k_column,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> of a tile (rows, columns), float32; rows and columns outside hold what must not be used."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, depth, BLOCK_D):
        a = load_rows(q, rows, n, start, depth, q_row, q_column, BLOCK_D, EVEN)
        b = load_rows(k, columns, m, start, depth, k_row, k_column, BLOCK_D, EVEN)
        total = dot(a, tl.trans(b), total, PRECISION)
    return total


@triton.jit
def leave_out(
    s, rows, columns, n, m,
    diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER: tl.constexpr,
):  # fmt: skip
    """The tile of scores with -inf for a pair that is outside of the n x m matrix or that a rule leaves out."""
    row_kept = rows < n
    column_kept = columns < m
    if query_mask is not None:
        row_kept = row_kept & (tl.load(query_mask + rows, mask=row_kept, other=0) != 0)
    if key_mask is not None:
        column_kept = column_kept & (tl.load(key_mask + columns, mask=column_kept, other=0) != 0)
    kept = row_kept[:, None] & column_kept[None, :]
    if diagonal is not None:
        at = rows + diagonal
        place = columns
        if period is not None:
            at = at % period
            place = columns % period
        kept = kept & (at[:, None] != place[None, :])
    if query_groups is not None:
        row_group = tl.load(query_groups + rows, mask=rows < n, other=0)
        column_group = tl.load(key_groups + columns, mask=columns < m, other=0)
        kept = kept & ((row_group[:, None] == column_group[None, :]) == DIFFER)
    return tl.where(kept, s, -float("inf"))


@triton.jit
def grouped(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """The tile of a program, GROUP rows of tiles at a time: what runs together shares its operands in the L2 cache."""
    width = GROUP * column_blocks
    first = (program // width) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    inside = program % width
    return first + inside % height, inside // height


@triton.jit
def chunked(program, row_blocks, column_blocks, splits, chunk, GROUP: tl.constexpr):
    """(block of rows, part, its first tile of keys, the one after its last) of a program; parts are `chunk` tiles."""
    i, part = grouped(program, row_blocks, splits, GROUP)
    begin = part * chunk
    return i, part, begin, tl.minimum(begin + chunk, column_blocks)


@triton.jit
def finite(x):
    """What is subtracted before exp2: x, or 0 for an infinity, whose difference with itself is NaN."""
    return tl.where((x == float("inf")) | (x == -float("inf")), 0.0, x)
