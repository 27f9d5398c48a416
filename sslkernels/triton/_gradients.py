# SPDX-License-Identifier: Apache-2.0
"""Gradients through log-sum-exps of scores: dq = scale W k, dk = scale W^T q, dscale = sum of W_ij <q_i, k_j>, where

    W_ij = sum over beta of beta (g_i exp(beta s_ij - row_lse_i) + h_j exp(beta s_ij - col_lse_j))

Two ways, by D (the table's row "gradient_whole"). Where a block's gradient fits the registers, `gradient_kernel` sweeps
the keys, W stays in registers, and dk is the same kernel with the sides exchanged: 4 products, no memory. Beyond, a
panel of W goes to memory and torch multiplies: 3 products, and 6 bytes an element of W written and read. On an H100 the
fourth product costs 2 D / 6e14 s an element and the panel 6 / 3e12 s: even at D = 600, but the registers end at 128.
A self-similarity has dz = scale (G + G^T) z: W with the rows' terms on both sides, swept whole. Its upper half alone
would need three products of half the matrix instead of two of the whole, and a sum over blocks in memory.
CLIP N = 32,768, D = 512 on an H100: W 3 ms (as the forward's sweep), its 6.4 GB of traffic partly beneath two products
of 1.7 ms each.
"""
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._lse import LEAST
from sslkernels.triton._panel import add_product, panel_rows, panels, product
from sslkernels.triton._scores import (
    Pairs,
    chunked,
    grouped,
    leave_out,
    load_rows,
    pairs,
    products,
    row_major,
    tiles,
    whole,
)
from sslkernels.triton._tiles import LOG2E, dot, scalar


class Side(NamedTuple):
    """Of the rows (or columns) of W: their log-sum-exps (S, N), and the gradients of these, None for ones."""

    lse: Tensor | None = None
    grad: Tensor | None = None

    def arguments(self) -> tuple:
        strides = (0, 0) if self.grad is None else self.grad.stride()
        return self.lse, self.grad, *strides


class Partner(NamedTuple):
    """Gradient of positive_i = scale <q_i, k_j>, j = i + offset modulo M; KIND 1: rows, 2: columns, 3: both."""

    grad: Tensor | None = None
    offset: int = 0
    KIND: int = 0

    def arguments(self) -> tuple:
        return self.grad, 0 if self.grad is None else self.grad.stride(0), self.offset


NO_SIDE, NO_PARTNER = Side(), Partner()


@triton.jit
def load_side(lse, grad, channel_stride, stride, x, count, betas, unit):
    """Log-sum-exps in units of log 2 and weights of a block, one vector a beta; nothing if lse is None."""
    references, weights = (), ()
    if lse is not None:
        for channel in tl.static_range(len(betas)):
            references += (load_reference(lse + channel * count, x, count),)
            weight = betas[channel] * unit
            if grad is not None:
                at = x.to(tl.int64) * stride + channel * channel_stride
                weight = weight * tl.load(grad + at, mask=x < count, other=0.0).to(tl.float32)
            weights += (weight + tl.zeros(x.shape, tl.float32),)
    return references, weights


@triton.jit
def channels_of(lse, count, betas):
    pointers = ()
    for channel in tl.static_range(len(betas)):
        pointers += (lse + channel * count,)
    return pointers


@triton.jit
def load_reference(lse, x, count):
    """2^(s - inf) is 0: what an empty row is to give."""
    value = tl.load(lse + x, mask=x < count, other=-float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value * LOG2E)


@triton.jit
def bounds(reference, low, high):
    """The range of log-sum-exps, extended by those of a block; an infinity extends nothing."""
    inside = tl.abs(reference) < float("inf")
    low = tl.minimum(low, tl.min(tl.where(inside, reference, float("inf")), 0))
    return low, tl.maximum(high, tl.max(tl.where(inside, reference, -float("inf")), 0))


@triton.jit
def middles(row_references, lse, begin, end, betas):
    """Of the range of the log-sum-exps of each beta its middle, and whether one exp2 an element can serve both sides.

    Rows' are given, columns' are read from begin to end: 4 bytes a column, once a program.
    """
    shared = True
    middle = ()
    for channel in tl.static_range(len(betas)):
        low, high = bounds(row_references[channel], float("inf"), -float("inf"))
        for start in range(begin, end, 512):
            x = start + tl.arange(0, 512)
            low, high = bounds(load_reference(lse[channel], x, end), low, high)
        shared = shared & (high - low < 60.0)
        middle += (tl.where(high < low, 0.0, (low + high) * 0.5),)
    return shared, middle


@triton.jit
def weights_of(s, betas, row_references, row_weights, column_references, column_weights, shared, middle):
    """The tile of W of a tile of scores. Shared: 2^(s - middle), far from no log-sum-exp, serves both sides."""
    w = tl.zeros_like(s)
    if len(row_references) == 0 or len(column_references) == 0:
        for channel in tl.static_range(len(betas)):
            scaled = s * tl.maximum(betas[channel], LEAST)
            if len(row_references) > 0:
                w += row_weights[channel][:, None] * tl.exp2(scaled - row_references[channel][:, None])
            if len(column_references) > 0:
                w += column_weights[channel][None, :] * tl.exp2(scaled - column_references[channel][None, :])
    elif shared:
        for channel in tl.static_range(len(betas)):
            by_row = row_weights[channel] * tl.exp2(middle[channel] - row_references[channel])
            by_column = column_weights[channel] * tl.exp2(middle[channel] - column_references[channel])
            scaled = s * tl.maximum(betas[channel], LEAST)
            w += tl.exp2(scaled - middle[channel]) * (by_row[:, None] + by_column[None, :])
    else:
        for channel in tl.static_range(len(betas)):
            scaled = s * tl.maximum(betas[channel], LEAST)
            w += row_weights[channel][:, None] * tl.exp2(scaled - row_references[channel][:, None])
            w += column_weights[channel][None, :] * tl.exp2(scaled - column_references[channel][None, :])
    return w


@triton.jit
def complete(
    total, q, k, rows, start, last, n, m, depth, q_row, q_column, k_row, k_column, partner_grad, partner_stride, offset,
    out, scale, KIND: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Adds to rows of W k what the positives give, stores scale times that; their products with q, for the scale's."""
    d = start + tl.arange(0, BLOCK_D)
    stored = (rows < last)[:, None] & (d < depth)[None, :]
    if KIND % 2 == 1:
        grad = tl.load(partner_grad + rows.to(tl.int64) * partner_stride, mask=rows < n, other=0.0)
        beside = load_rows(k, (rows + offset) % m, m, start, depth, k_row, k_column, BLOCK_D, EVEN)
        total += grad[:, None] * beside.to(tl.float32)
    if KIND >= 2:
        other = (rows + (n - offset % n)) % n
        grad = tl.load(partner_grad + other.to(tl.int64) * partner_stride, mask=(rows < n) & (other < m), other=0.0)
        beside = load_rows(k, other, m, start, depth, k_row, k_column, BLOCK_D, EVEN)
        total += grad[:, None] * beside.to(tl.float32)
    if out is not None:
        at = rows[:, None].to(tl.int64) * depth + d[None, :]
        tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=stored)
    a = load_rows(q, rows, n, start, depth, q_row, q_column, BLOCK_D, EVEN).to(tl.float32)
    return tl.sum(tl.sum(tl.where(stored, total * a, 0.0), 1), 0)


@triton.jit
def gradient_kernel(
    q, k, scale_tensor, scale, betas, unit_tensor, unit,
    row_lse, row_grad, row_channel, row_stride, col_lse, col_grad, col_channel, col_stride,
    partner_grad, partner_stride, offset, out, part_out, dscale,
    n, m, depth, q_row, q_column, k_row, k_column, splits, chunk,
    diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER: tl.constexpr,
    KIND: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows of W k over a chunk of keys: dq and the scale's gradient if there is one chunk, else sums in part_out."""
    i, part, begin, end = chunked(
        tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), splits, chunk, GROUP
    )  # fmt: skip
    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = scalar(scale_tensor, scale)
    unit = scalar(unit_tensor, unit)
    a = load_rows(q, rows, n, 0, depth, q_row, q_column, BLOCK_D, EVEN)
    row_references, row_weights = load_side(row_lse, row_grad, row_channel, row_stride, rows, n, betas, unit)
    shared, middle = False, ()
    if row_lse is not None and col_lse is not None:
        shared, middle = middles(
            row_references, channels_of(col_lse, m, betas), begin * BLOCK_M, tl.minimum(end * BLOCK_M, m), betas
        )
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for j in range(begin, end):
        columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
        b = load_rows(k, columns, m, 0, depth, k_row, k_column, BLOCK_D, EVEN)
        s = dot(a, tl.trans(b), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        s = leave_out(
            s * (factor * LOG2E), rows, columns, n, m,
            diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER,
        )  # fmt: skip
        references, weights = load_side(col_lse, col_grad, col_channel, col_stride, columns, m, betas, unit)
        w = weights_of(s, betas, row_references, row_weights, references, weights, shared, middle)
        if a.dtype == b.dtype:
            w = w.to(b.dtype)
        total = dot(w, b, total, PRECISION)
    total = total * (1.0 / unit)
    if part_out is not None:
        d = tl.arange(0, BLOCK_D)
        at = (part * n + rows).to(tl.int64)[:, None] * depth + d[None, :]
        tl.store(part_out + at, total, mask=(rows < n)[:, None] & (d < depth)[None, :])
    else:
        along = complete(
            total, q, k, rows, 0, n, n, m, depth, q_row, q_column, k_row, k_column,
            partner_grad, partner_stride, offset, out, factor, KIND, BLOCK_D, EVEN,
        )  # fmt: skip
        if dscale is not None:
            tl.store(dscale + i, along)


@triton.jit
def lse_weights_kernel(
    q, k, scale_tensor, scale, betas, unit_tensor, unit,
    row_lse, row_grad, row_channel, row_stride, col_lse, col_grad, col_channel, col_stride, panel,
    first, last, n, m, depth, q_row, q_column, k_row, k_column,
    diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The panel's rows first .. last of W, a tile a program."""
    blocks = tl.cdiv(last - first, BLOCK_N)
    i, j = grouped(tl.program_id(0), blocks, tl.cdiv(m, BLOCK_M), GROUP)
    inside = i * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first + inside
    columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
    s = products(
        q, k, rows, columns, n, m, depth, q_row, q_column, k_row, k_column,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
    )  # fmt: skip
    s = leave_out(
        s * (scalar(scale_tensor, scale) * LOG2E), rows, columns, n, m,
        diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER,
    )  # fmt: skip
    unit = scalar(unit_tensor, unit)
    row_references, row_weights = load_side(row_lse, row_grad, row_channel, row_stride, rows, n, betas, unit)
    references, weights = load_side(col_lse, col_grad, col_channel, col_stride, columns, m, betas, unit)
    shared, middle = False, ()
    if row_lse is not None and col_lse is not None:
        lse = channels_of(col_lse, m, betas)
        shared, middle = middles(row_references, lse, j * BLOCK_M, tl.minimum((j + 1) * BLOCK_M, m), betas)
    w = weights_of(s, betas, row_references, row_weights, references, weights, shared, middle)
    at = inside[:, None].to(tl.int64) * m + columns[None, :]
    tl.store(panel + at, w.to(panel.dtype.element_ty), mask=(rows < last)[:, None] & (columns < m)[None, :])


@triton.jit
def complete_kernel(
    part, q, k, scale_tensor, scale, unit_tensor, unit, partner_grad, partner_stride, offset, out, dscale,
    first, last, n, m, depth, q_row, q_column, k_row, k_column, splits,
    KIND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first .. last of a gradient from the sums in part (splits, last - first, D), which may be None for zeros."""
    inside = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = first + inside
    along = 0.0
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        if part is not None:
            for i in range(0, splits):
                at = (i * (last - first) + inside).to(tl.int64)[:, None] * depth + d[None, :]
                total += tl.load(part + at, mask=(rows < last)[:, None] & (d < depth)[None, :], other=0.0)
            total = total * (1.0 / scalar(unit_tensor, unit))
        along += complete(
            total, q, k, rows, start, last, n, m, depth, q_row, q_column, k_row, k_column,
            partner_grad, partner_stride, offset, out, scalar(scale_tensor, scale), KIND, BLOCK_D, False,
        )  # fmt: skip
    if dscale is not None:
        tl.store(dscale + tl.program_id(0), along)


@triton.jit
def unit_kernel(row_grad, row_stride, rows, col_grad, col_stride, columns, most, out, BLOCK: tl.constexpr):
    """The power of two that takes the largest possible weight near 2^13: float16 ends at 2^16 and is exact to 2^-14."""
    bound = tl.zeros((BLOCK,), tl.float32)
    if row_grad is not None:
        bound = largest(row_grad, row_stride, rows, bound, BLOCK)
    if col_grad is not None:
        bound = largest(col_grad, col_stride, columns, bound, BLOCK)
    exponent = 12.0 - tl.floor(tl.log2(tl.max(bound, 0) * most))
    usual = (exponent > -100.0) & (exponent < 100.0)
    tl.store(out, tl.exp2(tl.where(usual, exponent, 0.0)))


@triton.jit
def largest(x, stride, count, high, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        high = tl.maximum(high, tl.abs(tl.load(x + at.to(tl.int64) * stride, mask=at < count, other=0.0)))
    return high


def split_rarely(x: Tensor, row_blocks: int, tiles: int, least: int = 8) -> tuple[int, int]:
    """(parts, tiles in each) where a part's result is large: only what fills the device, of `least` tiles or more."""
    chunk = cdiv(tiles, min(max(2 * multiprocessors(x) // row_blocks, 1), max(tiles // least, 1)))
    return cdiv(tiles, chunk), chunk


def narrow(q: Tensor, k: Tensor) -> torch.dtype:
    """The dtype of what multiplies with either: 16 bits only where both have the same."""
    return q.dtype if q.dtype == k.dtype else torch.float32


def unit_of(q: Tensor, k: Tensor, betas, rows: Side, columns: Side) -> tuple[Tensor | None, float]:
    """What the weights are multiplied by, so that float16 holds them: a tensor or a number."""
    grads = [side.grad for side in (rows, columns)]
    if narrow(q, k) != torch.float16:
        return None, 1.0
    if grads == [None, None]:
        return None, 2.0**13
    flat = [None if grad is None else grad.reshape(-1) for grad in grads]
    sides = [x for grad in flat for x in ((None, 0, 0) if grad is None else (grad, grad.stride(0), grad.numel()))]
    unit = torch.empty((), dtype=torch.float32, device=q.device)
    launch(unit_kernel, (1,), *sides, 2.0 * sum(betas), unit, **shape("largest", q))
    return unit, 1.0


class Sweep(NamedTuple):
    """One side's gradient: that of q as the rows of W, or of k with all sides exchanged."""

    q: Tensor
    k: Tensor
    scale: tuple[Tensor | None, float]
    betas: tuple[float, ...]
    unit: tuple[Tensor | None, float]
    rows: Side
    columns: Side
    partner: Partner
    rules: Pairs
    wide: bool = False  # float32 gradients, for a loss that emits them before it knows what they are multiplied by

    def dtype(self, x: Tensor) -> torch.dtype:
        return torch.float32 if self.wide else x.dtype

    def transposed(self) -> Sweep:
        partner = self.partner._replace(KIND={0: 0, 1: 2, 2: 1, 3: 3}[self.partner.KIND])
        sides = self.columns, self.rows, partner, self.rules.transposed()
        return Sweep(self.k, self.q, self.scale, self.betas, self.unit, *sides, self.wide)

    def complete(self, part, splits: int, out, rows: slice, along: list[Tensor] | None) -> None:
        """The rows' gradient from their sums; what they give to the scale's is appended to `along`."""
        block = shape("complete", self.q)
        programs = cdiv(rows.stop - rows.start, block["BLOCK"])
        dscale = None if along is None else _float32(self.q, programs)
        launch(
            complete_kernel, (programs,), part, self.q, self.k, *self.scale, *self.unit, *self.partner.arguments(), out,
            dscale, rows.start, rows.stop, *self.sizes(), splits, KIND=self.partner.KIND, **block,
        )  # fmt: skip
        if along is not None and dscale is not None:
            along.append(dscale)

    def busy(self) -> bool:
        return len(self.betas) > 1 or self.rules.vectors()

    def sizes(self) -> tuple[int, ...]:
        return self.q.shape[0], self.k.shape[0], self.q.shape[1], *self.q.stride(), *self.k.stride()

    def in_registers(self, wanted: bool, along: list[Tensor] | None) -> Tensor | None:
        (n, depth), m = self.q.shape, self.k.shape[0]
        out = torch.empty((n, depth), dtype=self.dtype(self.q), device=self.q.device) if wanted else None
        if self.rows.lse is None and self.columns.lse is None:  # W is zero
            self.complete(None, 0, out, slice(0, n), along)
            return out
        tile = tiles("gradient", self.q, self.k, fits=True, busy=self.busy())
        row_blocks = cdiv(n, tile["BLOCK_N"])
        splits, chunk = split_rarely(self.q, row_blocks, cdiv(m, tile["BLOCK_M"]))
        part = _float32(self.q, splits, n, depth) if splits > 1 else None
        dscale = None if along is None or splits > 1 else _float32(self.q, row_blocks)
        launch(
            gradient_kernel, (row_blocks * splits,), self.q, self.k, *self.scale, self.betas, *self.unit,
            *self.rows.arguments(), *self.columns.arguments(), *self.partner.arguments(), out, part, dscale,
            *self.sizes(), splits, chunk, *self.rules, KIND=self.partner.KIND, **tile,
        )  # fmt: skip
        if part is not None:
            # the parts have been divided by the unit already
            self._replace(unit=(None, 1.0)).complete(part, splits, out, slice(0, n), along)
        elif along is not None and dscale is not None:
            along.append(dscale)
        return out

    def weights(self, panel: Tensor, rows: slice, tile: dict) -> None:
        blocks = cdiv(rows.stop - rows.start, tile["BLOCK_N"]) * cdiv(self.k.shape[0], tile["BLOCK_M"])
        launch(
            lse_weights_kernel, (blocks,), self.q, self.k, *self.scale, self.betas, *self.unit, *self.rows.arguments(),
            *self.columns.arguments(), panel, rows.start, rows.stop, *self.sizes(), *self.rules, **tile,
        )  # fmt: skip

    def in_panels(self, want_q: bool, want_k: bool, along: list[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        (n, depth), m, dtype = self.q.shape, self.k.shape[0], narrow(self.q, self.k)
        q, k, tile = self.q, self.k, tiles("panel", self.q, self.k, fits=False, busy=self.busy())
        wide_q, wide_k = q.to(dtype), k.to(dtype)
        height = panel_rows(n, m, dtype.itemsize)
        panel = torch.empty(height, m, dtype=dtype, device=q.device)
        dq = torch.empty((n, depth), dtype=self.dtype(q), device=q.device) if want_q else None
        by_rows = want_q or not want_k
        sums = _float32(q, height, depth) if by_rows else None
        total = _float32(q, m, depth) if want_k else None
        for rows in panels(n, m, dtype):
            w = panel[: rows.stop - rows.start]
            self.weights(w, rows, tile)
            if sums is not None:
                part = sums[: rows.stop - rows.start]
                product(w, wide_k, out=part)
                self.complete(part, 1, dq, rows, along)
            if total is not None:
                add_product(total, w.T, wide_q[rows], first=rows.start == 0)
        if total is None:
            return dq, None
        dk = torch.empty((m, depth), dtype=self.dtype(k), device=k.device)
        self.transposed().complete(total, 1, dk, slice(0, m), None if by_rows else along)
        return dq, dk

    def multiply(self, out: Tensor) -> None:
        """out = W k, float32, with weights that need no tensor to be brought to their unit."""
        (n, _), m, dtype = self.q.shape, self.k.shape[0], narrow(self.q, self.k)
        panel = torch.empty(panel_rows(n, m, dtype.itemsize), m, dtype=dtype, device=out.device)
        tile, wide_k = tiles("panel", self.q, self.k, fits=False, busy=self.busy()), self.k.to(dtype)
        for rows in panels(n, m, dtype):
            w = panel[: rows.stop - rows.start]
            self.weights(w, rows, tile)
            product(w, wide_k, out=out[rows])
        if self.unit[1] != 1.0:
            out *= 1.0 / self.unit[1]


def _float32(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.float32, device=like.device)


def gradients(sweep: Sweep, want_q: bool, want_k: bool, want_scale: bool, share: float = 1.0) -> tuple[Tensor, ...]:
    """dq, dk and dscale (a share of the sum), empty where they are not wanted."""
    q, k = row_major(sweep.q, sweep.k)
    sweep = sweep._replace(q=q, k=k)
    along: list[Tensor] = []
    if not (want_q or want_k or want_scale):
        dq = dk = None
    elif q.shape[0] == 0 or k.shape[0] == 0:
        dq, dk = (
            x.new_zeros(x.shape, dtype=sweep.dtype(x)) if wanted else None for x, wanted in ((q, want_q), (k, want_k))
        )
    elif whole("gradient", q, k) or (sweep.rows.lse is None and sweep.columns.lse is None):
        by_rows = want_q or not want_k
        dq = sweep.in_registers(want_q, along if want_scale else None) if by_rows else None
        dk = sweep.transposed().in_registers(True, along if want_scale and not by_rows else None) if want_k else None
    else:
        dq, dk = sweep.in_panels(want_q, want_k, along if want_scale else None)
    dscale = _float32(q, 0)
    if want_scale:
        dscale = (
            (torch.cat(along) if len(along) > 1 else along[0]).sum() if along else q.new_zeros((), dtype=torch.float32)
        )
    if want_scale and share != 1.0:
        dscale *= share
    return q.new_empty(0) if dq is None else dq, k.new_empty(0) if dk is None else dk, dscale


def similarity_logsumexp_backward(
    grad_row, grad_col, grad_positive, q, k, scale_tensor, scale, diagonal, period, query_groups, key_groups, key_mask,
    differ, scales, offset, row_lse, col_lse, scores, output_mask,
):  # fmt: skip
    rows = Side() if grad_row is None else Side(row_lse, grad_row)
    columns = Side() if grad_col is None else Side(col_lse, grad_col)
    partner = Partner() if grad_positive is None else Partner(grad_positive, offset % max(k.shape[0], 1), 1)
    rules = pairs(diagonal, period, query_groups, key_groups, key_mask, differ, n=q.shape[0], m=k.shape[0])
    unit = unit_of(q, k, scales, rows, columns)
    sweep = Sweep(q, k, (scale_tensor, scale), tuple(scales), unit, rows, columns, partner, rules)
    return gradients(sweep, *output_mask)


def self_similarity_logsumexp_backward(
    grad, grad_positive, z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, scales, offset, lse,
    scores, output_mask,
):  # fmt: skip
    m = z.shape[0]
    side = Side() if grad is None else Side(lse, grad)
    partner = Partner() if grad_positive is None else Partner(grad_positive, offset % max(m, 1), 3)
    rules = pairs(diagonal, period, groups, groups, key_mask, differ, n=m, m=m, query_mask=key_mask)
    unit = unit_of(z, z, scales, side, side)
    sweep = Sweep(z, z, (scale_tensor, scale), tuple(scales), unit, side, side, partner, rules)
    # each pair has given its part twice, once from either side
    dz, _, dscale = gradients(sweep, output_mask[0], False, output_mask[1], share=0.5)
    return dz, dscale
