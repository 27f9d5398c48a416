# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp on potentials: the scores are only read, one number a prototype and one a sample change.

With e_bk = exp((x_bk - c_k - z_b) / eps), an iteration sets c so that the columns of e sum to B / K and z so that the
rows sum to one. Where one side of the matrix is short (the 256 prototypes of 65,536 samples, or the 256 samples of
65,536 prototypes), a program holds rows that are whole along the short side in registers: it normalises them, and adds
what they then give to the sums along the long side, all from one reading. So an iteration is one sweep, and all is
iterations + 1 readings and one writing of the codes. The sums along the long side are one partial a program, merged in
order by a second, small kernel. Where both sides are long, rows are normalised by their peaks and an iteration reads
twice.

H100, 65,536 x 256 in float32 (67 MB), 3 iterations: 4 readings and the codes are 335 MB, 100 us at 3.35 TB/s, where
scores and codes once would be 40 us. Sweeps go to and fro, so that each finds in the L2 cache (50 MB) what the one
before has read last: with 30 MB of it 245 MB remain, 75 us. bfloat16 scores fit it: 34 + 67 MB and three readings from
the cache, about 50 us.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.triton._distillation_rows import find_peaks, softmax_rows
from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._tiles import LOG2E

SHORT = 4096  # a row that a program holds whole has at most as many elements


@triton.jit
def differences(x, potential, r, v, end, columns, row_stride, column_stride):
    """x_rv - potential_v; -inf outside."""
    offsets = r.to(tl.int64)[:, None] * row_stride + v.to(tl.int64)[None, :] * column_stride
    mask = (r < end)[:, None] & (v < columns)[None, :]
    d = tl.load(x + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    if potential is not None:
        d -= tl.load(potential + v, mask=v < columns, other=0.0)[None, :]
    return d


@triton.jit(do_not_specialize=["turn"])
def sweep_kernel(
    x, potential, row_top, row_excess, row_potential, best, total, turn, factor, ratio, rows, columns, parts,
    rows_a_part, view_stride, row_stride, column_stride,
    NORMALIZE: tl.constexpr, LOGS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of columns over a part of the rows, of 2^((x_rv - potential_v) factor) or what is left of it in normal rows.

    NORMALIZE makes each row, whole in a block, sum to 1 / ratio, and `row_potential` takes what does so; otherwise the
    peaks of the rows do. LOGS: the sums may have any size, and are relative to their largest term, kept in `best`.
    `turn` is 0, or the last program: then it begins where the sweep before has ended, in the L2 cache.
    """
    program = tl.abs(turn - tl.program_id(0))
    part = program % parts
    v = program // parts * BLOCK_C + tl.arange(0, BLOCK_C)
    view = tl.program_id(1).to(tl.int64)
    x += view * view_stride
    if potential is not None:
        potential += view * columns
    highest = tl.full((BLOCK_C,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    end = tl.minimum(rows, (part + 1) * rows_a_part)
    for start in range(part * rows_a_part, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        d = differences(x, potential, r, v, end, columns, row_stride, column_stride)
        if NORMALIZE:
            top = tl.max(d, 1)
            e = tl.exp2((d - top[:, None]) * factor)
            mass = tl.sum(e, 1) * ratio
            own = top + tl.log2(mass) / factor
            if row_potential is not None:
                tl.store(row_potential + view * rows + r, own, mask=r < end)
            if LOGS:
                d = tl.where((r < end)[:, None], d - own[:, None], -float("inf"))
            else:
                sums += tl.sum(tl.where((r < end)[:, None], e / mass[:, None], 0.0), 0)
        if LOGS:
            above = tl.maximum(highest, tl.max(d, 0))
            reference = tl.where(above == -float("inf"), 0.0, above)
            sums = sums * tl.exp2((highest - reference) * factor)
            sums += tl.sum(tl.exp2((d - reference[None, :]) * factor), 0)
            highest = above
        elif not NORMALIZE:
            at = view * rows + r
            peak = tl.load(row_top + at, mask=r < end, other=0.0)
            excess = tl.load(row_excess + at, mask=r < end, other=0.0)
            sums += tl.sum(tl.exp2((d - peak[:, None]) * factor) / (1 + excess)[:, None], 0)
    at = (view * parts + part) * columns + v
    if total is not None:
        tl.store(total + at, sums, mask=v < columns)
        if LOGS:
            tl.store(best + at, highest, mask=v < columns)


@triton.jit
def merge_kernel(
    best, total, before, potential, factor, ratio, columns, parts,
    LOGS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """potential = log2(ratio sum) / factor, and `before` it, with the sums of all parts in order."""
    v = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    view = tl.program_id(1).to(tl.int64)
    highest = tl.full((BLOCK_C,), -float("inf"), tl.float32)
    if LOGS:
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < parts)[:, None] & (v < columns)[None, :]
            at = (view * parts + p)[:, None] * columns + v[None, :]
            highest = tl.maximum(highest, tl.max(tl.load(best + at, mask=mask, other=-float("inf")), 0))
    highest = tl.where(highest == -float("inf"), 0.0, highest)  # the log of nothing is -inf, while +inf is NaN
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < parts)[:, None] & (v < columns)[None, :]
        at = (view * parts + p)[:, None] * columns + v[None, :]
        s = tl.load(total + at, mask=mask, other=0.0)
        if LOGS:
            lag = tl.load(best + at, mask=mask, other=-float("inf")) - highest[None, :]
            s = tl.where(mask, s * tl.exp2(lag * factor), 0.0)
        sums += tl.sum(s, 0)
    value = tl.log2(sums * ratio) / factor
    if LOGS:
        value += highest
    elif before is not None:
        value += tl.load(before + view * columns + v, mask=v < columns, other=0.0)
    tl.store(potential + view * columns + v, value, mask=v < columns)


@triton.jit(do_not_specialize=["turn"])
def codes_kernel(
    x, potential, row_potential, out, turn, factor, rows, columns, view_stride, row_stride, column_stride,
    out_view, out_row, out_column, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """exp2((x - potential - row_potential) factor), or rows that sum to one where there is no row potential."""
    r = tl.abs(turn - tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.arange(0, BLOCK_C)
    view = tl.program_id(1).to(tl.int64)
    potential += view * columns
    d = differences(x + view * view_stride, potential, r, v, rows, columns, row_stride, column_stride)
    if row_potential is not None:
        d -= tl.load(row_potential + view * rows + r, mask=r < rows, other=0.0)[:, None]
        codes = tl.exp2(d * factor)
    else:
        e = tl.exp2((d - tl.max(d, 1)[:, None]) * factor)
        codes = e / tl.sum(e, 1)[:, None]
    offsets = r.to(tl.int64)[:, None] * out_row + v.to(tl.int64)[None, :] * out_column
    mask = (r < rows)[:, None] & (v < columns)[None, :]
    tl.store(out + view * out_view + offsets, codes, mask=mask, eviction_policy="evict_first")


class _Tiles(NamedTuple):
    """How a matrix (views, rows, columns) is cut."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int
    blocks: int  # of columns
    parts: int  # of rows
    rows_a_part: int

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_R": self.BLOCK_R, "BLOCK_C": self.BLOCK_C, "num_warps": self.num_warps}


def _cut(x: Tensor, whole: bool) -> _Tiles:
    views, rows, columns = x.shape
    tile = shape("sinkhorn", x)
    width = max(16, triton.next_power_of_2(columns)) if whole else tile["BLOCK_C"]
    height = max(1, tile["TILE"] // width)
    blocks, tiles = cdiv(columns, width), cdiv(rows, height)
    parts = max(1, min(tiles, 4 * multiprocessors(x) // (blocks * views)))
    each = cdiv(tiles, parts) * height
    return _Tiles(height, width, tile["num_warps"], blocks, cdiv(rows, each), each)


class _Sweeps:
    """A matrix with its rows along the long side, and what an iteration does to the potentials of its columns."""

    def __init__(self, x: Tensor, epsilon: float, ratio: float, row_ratio: float, whole: bool):
        self.x, self.epsilon, self.whole = x, epsilon, whole
        self.tiles, self.factor = _cut(x, whole), LOG2E.value / epsilon
        self.ratio, self.row_ratio = ratio, row_ratio  # what sums of columns and of rows are multiplied by
        shape_of_partial = x.shape[0], self.tiles.parts, x.shape[2]
        self.best, self.total = x.new_empty(2, *shape_of_partial, dtype=torch.float32).unbind()
        self.potential: Tensor | None = None
        self.sweeps = 0

    def turn(self, programs):
        """Sweeps go to and fro."""
        self.sweeps += 1
        return 0 if self.sweeps % 2 else programs - 1

    def next(self, *, before=True):
        """The next potentials, or without those before them what a sweep adds; long rows are read twice."""
        peaks = (None, None)
        if self.potential is not None and not self.whole:
            peaks = find_peaks([self.x], self.potential, self.epsilon)[:2]
        self.sweep(normalize=self.whole and self.potential is not None, peaks=peaks, before=before)

    def sweep(self, *, normalize, row_potential=None, peaks=(None, None), last=False, before=True):
        views, rows, columns = self.x.shape
        cut = self.tiles
        partial = (None, None) if last else (self.best, self.total)
        operands = self.x, self.potential, *peaks, row_potential, *partial, self.turn(cut.parts * cut.blocks)
        sizes = self.factor, self.row_ratio, rows, columns, cut.parts, cut.rows_a_part, *self.x.stride()
        logs = self.potential is None and not last
        grid = cut.parts * cut.blocks, views
        launch(sweep_kernel, grid, *operands, *sizes, NORMALIZE=normalize, LOGS=logs, **cut.options)
        if last:
            return
        start, self.potential = self.potential, self.x.new_empty(views, columns, dtype=torch.float32)
        operands = self.best, self.total, start if before else None, self.potential
        tile = shape("sinkhorn_merge", self.x)
        sizes = self.factor, self.ratio, columns, cut.parts
        launch(merge_kernel, (cdiv(columns, tile["BLOCK_C"]), views), *operands, *sizes, LOGS=logs, **tile)

    def codes(self, row_potential, out):
        cut, (views, rows, columns) = self.tiles, self.x.shape
        programs = cdiv(rows, cut.BLOCK_R)
        sizes = self.turn(programs), self.factor, rows, columns, *self.x.stride(), *out.stride()
        operands = self.x, self.potential, row_potential, out
        launch(codes_kernel, (programs, views), *operands, *sizes, **cut.options)


def _solve(scores, iterations, epsilon, want_codes):
    """(codes, which are empty where nobody wants them, centre) of (T, B, K)."""
    x = scores if scores.dim() == 3 else scores.unsqueeze(0)
    views, batch, width = x.shape
    out = x.new_empty(x.shape if want_codes else (0, 0, 0), dtype=torch.float32)
    usage = width / batch
    if batch < width and batch <= SHORT:
        sweeps = _Sweeps(x.mT, epsilon, 1.0, usage, whole=True)
        center = x.new_empty(views, width, dtype=torch.float32)
        for i in range(iterations):
            last = i == iterations - 1
            kept = center if last else None
            sweeps.sweep(normalize=True, row_potential=kept, last=last and not want_codes)
        if want_codes:
            sweeps.codes(center, out.mT)
        return out, center
    sweeps = _Sweeps(x, epsilon, usage, 1.0, whole=width <= SHORT)
    for _ in range(iterations):
        sweeps.next()
    if want_codes and sweeps.whole:
        sweeps.codes(None, out)
    elif want_codes:
        out = softmax_rows(x, sweeps.potential, epsilon)
    return out, sweeps.potential


def sinkhorn_sweep(scores, center, epsilon):
    x = scores if scores.dim() == 3 else scores.unsqueeze(0)
    views, batch, width = x.shape
    if batch == 0:
        return x.new_full((*scores.shape[:-2], width), -torch.inf, dtype=torch.float32)
    sweeps = _Sweeps(x, epsilon, 1.0, 1.0, whole=width <= SHORT)
    sweeps.potential = None if center is None else center.view(views, width)
    sweeps.next(before=False)
    assert sweeps.potential is not None
    return sweeps.potential.view(*scores.shape[:-2], width)


def sinkhorn_knopp(scores, iterations, epsilon):
    codes, _ = _solve(scores, iterations, epsilon, True)
    return codes.view(scores.shape)


def sinkhorn_center(scores, iterations, epsilon):
    _, center = _solve(scores, iterations, epsilon, False)
    return center if scores.dim() == 3 else center[0]
