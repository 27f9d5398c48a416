# SPDX-License-Identifier: Apache-2.0
"""Columns of two views: their moments, their treatment, the products of a column with itself or its partner, and the
way back through standardising. A program owns some columns of both views, so no sum crosses programs.

Bound by bytes: a view is read twice, the second time in part from the L2 cache, and its treated columns are written.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._columns import centered, moments
from sslkernels.triton._tiles import load_tile


@triton.jit
def store_rounded(z, value, rows, columns, row_count, column_count):
    """Store a tile of a dense matrix; what it became in the matrix's dtype, as float32."""
    rounded = value.to(z.dtype.element_ty)
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(z + rows[:, None].to(tl.int64) * column_count + columns[None, :], rounded, mask=inside)
    return rounded.to(tl.float32)


@triton.jit
def store_sums(sums, value, diagonal, columns, column_count, SUBTRACT: tl.constexpr):
    """(2, programs): over this program's columns what the loss has of them, and C's squared diagonal to SUBTRACT."""
    inside = columns < column_count
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0).to(tl.float64), 0))
    entry = tl.where(inside, diagonal, 0.0).to(tl.float64)
    squares = tl.sum(entry * entry, 0)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), squares if SUBTRACT else squares * 0.0)


@triton.jit
def correlation_columns_kernel(
    x, y, zx, zy, inverse, own, sums,
    rows, columns, x_row, x_column, y_row, y_column, eps, factor,
    SUBTRACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Standardise both views. own_j is what C's diagonal gives to the gradient of a column, as a multiple of its
    partner; SUBTRACT also what the products of whole columns give there without being asked."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_shift, x_rest, x_variance = moments(x, c, rows, columns, x_row, x_column, BLOCK_R)
    y_shift, y_rest, y_variance = moments(y, c, rows, columns, y_row, y_column, BLOCK_R)
    x_inverse = 1.0 / tl.sqrt_rn(x_variance + eps)
    y_inverse = 1.0 / tl.sqrt_rn(y_variance + eps)
    along = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    rounded = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a = centered(x, r, c, x_shift, x_rest, rows, columns, x_row, x_column) * x_inverse[None, :]
        b = centered(y, r, c, y_shift, y_rest, rows, columns, y_row, y_column) * y_inverse[None, :]
        along += a * b
        rounded += store_rounded(zx, a, r, c, rows, columns) * store_rounded(zy, b, r, c, rows, columns)
    away = 1.0 - tl.sum(along, 0) / rows
    # of the columns as the products see them: the diagonal of their C
    diagonal = tl.sum(rounded, 0)
    slope = -2.0 * away / rows
    if SUBTRACT:
        slope -= factor * diagonal
    inside = c < columns
    tl.store(own + c, slope, mask=inside)
    tl.store(inverse + c, x_inverse, mask=inside)
    tl.store(inverse + columns + c, y_inverse, mask=inside)
    store_sums(sums, away * away, diagonal, c, columns, SUBTRACT)


@triton.jit
def covariance_columns_kernel(
    x, y, zx, zy, own, sums,
    rows, columns, x_row, x_column, y_row, y_column, eps, gamma, invariance, spread, factor,
    SUBTRACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Centre both views. `invariance` weighs sum (x - y)^2, `spread` the hinge of each column's deviation."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_shift, x_rest, x_variance = moments(x, c, rows, columns, x_row, x_column, BLOCK_R)
    y_shift, y_rest, y_variance = moments(y, c, rows, columns, y_row, y_column, BLOCK_R)
    distance = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    x_square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    y_square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        a = centered(x, r, c, x_shift, x_rest, rows, columns, x_row, x_column)
        b = centered(y, r, c, y_shift, y_rest, rows, columns, y_row, y_column)
        raw = load_tile(x, r, c, x_row, x_column, rows, columns).to(tl.float32)
        raw -= load_tile(y, r, c, y_row, y_column, rows, columns).to(tl.float32)
        distance += raw * raw
        a = store_rounded(zx, a, r, c, rows, columns)
        b = store_rounded(zy, b, r, c, rows, columns)
        x_square += a * a
        y_square += b * b
    x_diagonal = tl.sum(x_square, 0)
    y_diagonal = tl.sum(y_square, 0)
    degrees = rows - 1.0
    x_std = tl.sqrt_rn(x_variance * (rows / degrees) + eps)
    y_std = tl.sqrt_rn(y_variance * (rows / degrees) + eps)
    x_slope = tl.where(x_std < gamma, -spread, 0.0) / (x_std * degrees)
    y_slope = tl.where(y_std < gamma, -spread, 0.0) / (y_std * degrees)
    if SUBTRACT:
        x_slope -= factor * x_diagonal
        y_slope -= factor * y_diagonal
    inside = c < columns
    tl.store(own + c, x_slope, mask=inside)
    tl.store(own + columns + c, y_slope, mask=inside)
    x_gap = tl.where(x_std > gamma, 0.0, gamma - x_std)  # NaN passes
    y_gap = tl.where(y_std > gamma, 0.0, gamma - y_std)
    value = invariance * tl.sum(distance, 0) + spread * (x_gap + y_gap)
    # x^2 + y^2 of the diagonals as one square
    store_sums(sums, value, tl.sqrt_rn(x_diagonal * x_diagonal + y_diagonal * y_diagonal), c, columns, SUBTRACT)


@triton.jit
def product_columns_kernel(
    a, b, own, sums,
    rows, columns, a_row, a_column, b_row, b_column, factor,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The diagonal of a^T b, which the products in Gram space have to lose again."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        left = load_tile(a, r, c, a_row, a_column, rows, columns).to(tl.float32)
        total += left * load_tile(b, r, c, b_row, b_column, rows, columns).to(tl.float32)
    diagonal = tl.sum(total, 0)
    tl.store(own + c, -factor * diagonal, mask=c < columns)
    store_sums(sums, tl.zeros_like(diagonal), diagonal, c, columns, True)


@triton.jit
def store_column_sums(sums, block, g, z, columns, column_count):
    """(blocks of rows, 2, D): sums of g and of g z over this program's rows."""
    sums += block.to(tl.int64) * 2 * column_count
    tl.store(sums + columns, tl.sum(g, 0), mask=columns < column_count)
    tl.store(sums + column_count + columns, tl.sum(g * z, 0), mask=columns < column_count)


@triton.jit
def blend_kernel(
    g, z, other, own, x, y, sums,
    rows, columns, x_row, x_column, y_row, y_column, factor, difference,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = factor g + own_j other + difference (x - y), in place, and its column sums where `sums` is given."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    value = factor * load_tile(g, r, c, columns, 1, rows, columns)
    slope = tl.load(own + c, mask=c < columns, other=0.0)
    value += slope[None, :] * load_tile(other, r, c, columns, 1, rows, columns).to(tl.float32)
    if x is not None:
        raw = load_tile(x, r, c, x_row, x_column, rows, columns).to(tl.float32)
        value += difference * (raw - load_tile(y, r, c, y_row, y_column, rows, columns).to(tl.float32))
    store_rounded(g, value, r, c, rows, columns)
    if sums is not None:
        unit = load_tile(z, r, c, columns, 1, rows, columns).to(tl.float32)
        store_column_sums(sums, tl.program_id(0), value, unit, c, columns)


@triton.jit
def finish_kernel(
    g, z, kappa, sums, inverse, dx,
    rows, columns, blocks, factor,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = (g - mean(g) - z mean(g z)) inverse; the sums are of g + factor kappa_i z, where kappa is given."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    along = tl.zeros((BLOCK_C,), tl.float32)
    inside = c < columns
    for _ in range(blocks):
        total += tl.load(sums + c, mask=inside, other=0.0)
        along += tl.load(sums + columns + c, mask=inside, other=0.0)
        sums += 2 * columns
    value = load_tile(g, r, c, columns, 1, rows, columns).to(tl.float32)
    unit = load_tile(z, r, c, columns, 1, rows, columns).to(tl.float32)
    if kappa is not None:
        value += (factor * tl.load(kappa + r, mask=r < rows, other=0.0))[:, None] * unit
    value = value - (total / rows)[None, :] - unit * (along / rows)[None, :]
    value *= tl.load(inverse + c, mask=inside, other=0.0)[None, :]
    store_rounded(dx, value, r, c, rows, columns)


@triton.jit
def total_kernel(value, sums, norms, programs, tiles, scale, BLOCK: tl.constexpr):
    """value = the columns' part + scale (norm - the diagonal's squares), with sums in float64 in a fixed order."""
    i = tl.arange(0, BLOCK)
    norm = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        norm += tl.load(norms + start + i, mask=start + i < tiles, other=0.0)
    total = tl.sum(norm, 0)
    rest = total * 0.0
    if sums is not None:
        part = tl.zeros((BLOCK,), tl.float64)
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, programs, BLOCK):
            inside = start + i < programs
            part += tl.load(sums + start + i, mask=inside, other=0.0)
            squares += tl.load(sums + programs + start + i, mask=inside, other=0.0)
        rest = tl.sum(part, 0)
        total -= tl.sum(squares, 0)
    total = tl.where(total < 0, 0.0, total)  # a difference of equals; NaN passes
    tl.store(value, (rest + scale * total).to(tl.float32))
