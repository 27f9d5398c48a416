# SPDX-License-Identifier: Apache-2.0
"""Gram space: K = Z Z^T of each view, N x N, and the gradients R Z of their inner product.

Tiles on and below the diagonal are computed, in parts of the columns where they are too few for the device, and lie in
float32 one after the other until `gram_close_kernel` adds the parts. The gradient multiplies K's entries off the
diagonal in 16 bits on tensor cores; the diagonal, of which standardising takes nearly all away again, stays float32.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._correlation_columns import store_column_sums, store_rounded
from sslkernels.triton._scores import grouped
from sslkernels.triton._tiles import dot, load_tile


@triton.jit
def triangle(tile):
    """(row, column <= row) of a tile, counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)  # float32 may have rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def gram_kernel(
    z, out, rows, columns, view_stride, row_stride, column_stride, out_part, chunk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the sum over `chunk` columns; grid (tiles, parts, views), out (parts, views, tiles, BLOCK_M^2)."""
    tile, part, view = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, column = triangle(tile)
    lane = tl.arange(0, BLOCK_M)
    left = tl.minimum(row * BLOCK_M + lane, rows - 1).to(tl.int64) * row_stride
    right = tl.minimum(column * BLOCK_M + lane, rows - 1).to(tl.int64) * row_stride
    z += view * view_stride
    end = tl.minimum(columns, (part + 1) * chunk)
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(part * chunk, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < end)[None, :]
        offsets = (k.to(tl.int64) * column_stride)[None, :]
        a = tl.load(z + left[:, None] + offsets, mask=inside, other=0.0)
        b = tl.load(z + right[:, None] + offsets, mask=inside, other=0.0)
        total = dot(a, tl.trans(b), total, PRECISION)
    out += part * out_part + (view * tl.num_programs(0) + tile) * BLOCK_M * BLOCK_M
    tl.store(out + lane[:, None] * BLOCK_M + lane[None, :], total)


@triton.jit
def sum_of_parts(out, offsets, parts, out_part):
    total = tl.load(out + offsets)
    for _ in range(1, parts):
        out += out_part
        total += tl.load(out + offsets)
    return total


@triton.jit
def gram_close_kernel(
    out, r, kappa, norms, rows, ld, parts, out_part, tiles, unit,
    CROSS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of a tile: r = unit K without its diagonal, which goes to kappa, and <K, K> or, CROSS, <K, K'>.

    Grid (tiles * BLOCK_M / BLOCK_R, views). What lies below the diagonal counts twice.
    """
    piece, view = tl.program_id(0), tl.program_id(1)
    tile = piece // (BLOCK_M // BLOCK_R)
    first = piece % (BLOCK_M // BLOCK_R) * BLOCK_R
    row, column = triangle(tile)
    i = first + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_M)
    inner = i[:, None] * BLOCK_M + j[None, :]
    k = sum_of_parts(out, (view.to(tl.int64) * tiles + tile) * BLOCK_M * BLOCK_M + inner, parts, out_part)
    i += row * BLOCK_M
    j += column * BLOCK_M
    inside = (i < rows)[:, None] & (j < rows)[None, :]
    weight = tl.where(row == column, 1.0, 2.0)
    other = k
    if CROSS:  # the pair is counted once, by the first view
        weight = tl.where(view == 0, weight, 0.0)
        other = sum_of_parts(out, (tiles + tile).to(tl.int64) * BLOCK_M * BLOCK_M + inner, parts, out_part)
    entries = tl.where(inside, k, 0.0).to(tl.float64) * tl.where(inside, other, 0.0).to(tl.float64)
    total = tl.sum(tl.sum(entries, 1), 0)
    # not 0 times a sum that may be NaN
    tl.store(norms + view * tl.num_programs(0) + piece, tl.where(weight == 0.0, 0.0, total * weight))
    if r is not None:
        r += view.to(tl.int64) * rows * ld
        kappa += view * rows
        same = i[:, None] == j[None, :]
        if row == column:
            tl.store(kappa + i, tl.sum(tl.where(same, k, 0.0), 1), mask=i < rows)
        rest = tl.where(same, 0.0, k * unit).to(r.dtype.element_ty)
        tl.store(r + i[:, None].to(tl.int64) * ld + j[None, :], rest, mask=inside)
        tl.store(r + j[:, None].to(tl.int64) * ld + i[None, :], tl.trans(rest), mask=tl.trans(inside))


@triton.jit
def finish_products(
    g, i, j, kappa, z, other, own, inverse, x, y, out, sums, row,
    rows, columns, z_row, z_column, other_row, other_column, x_row, x_column, y_row, y_column, factor, difference,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """What `gram_gradient_kernel` makes of the products g of some columns j."""
    if own is not None:
        slope = tl.load(own + j, mask=j < columns, other=0.0)
        g += slope[None, :] * load_tile(other, i, j, other_row, other_column, rows, columns).to(tl.float32)
    if x is not None:
        raw = load_tile(x, i, j, x_row, x_column, rows, columns).to(tl.float32)
        g += difference * (raw - load_tile(y, i, j, y_row, y_column, rows, columns).to(tl.float32))
    unit = load_tile(z, i, j, z_row, z_column, rows, columns).to(tl.float32)
    diagonal = (factor * tl.load(kappa + i, mask=i < rows, other=0.0))[:, None] * unit
    if inverse is None:
        store_rounded(out, g + diagonal, i, j, rows, columns)
    else:
        g = tl.where((i < rows)[:, None], g, 0.0)
        if WHOLE:
            g += diagonal
            g -= (tl.sum(g, 0) / rows)[None, :] + unit * (tl.sum(g * unit, 0) / rows)[None, :]
            g *= tl.load(inverse + j, mask=j < columns, other=0.0)[None, :]
            store_rounded(out, g, i, j, rows, columns)
        else:
            store_column_sums(sums, row, g + diagonal, unit, j, columns)
            store_rounded(out, g, i, j, rows, columns)


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns."""
    split = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(split, (0, 2, 1)))


@triton.jit
def gram_gradient_kernel(
    r, kappa, z, other, own, inverse, x, y, out, second, sums,
    rows, columns, ld, z_row, z_column, other_row, other_column, x_row, x_column, y_row, y_column,
    first, z_view, own_view, scale, factor, difference,
    CROSS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g_ij = scale (r z)_ij + factor kappa_i z_ij + own_j other_ij + difference (x_ij - y_ij), into `out` or `second`.

    Grid (tiles, views from `first` on); r, kappa and other are those of the other view (CROSS) or of the same, and the
    second view has the negative difference. With `inverse`, the gradient before standardising: at once where one tile
    has all rows (WHOLE), else g without its second term, and the column sums that `finish_kernel` needs. A quarter of
    the columns after the other: so what these need beside the products fits 128 registers a thread, and one tile's end
    runs beside another's products.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row, column = grouped(tl.program_id(0), row_blocks, tl.cdiv(columns, BLOCK_N), 8)
    view = first + tl.program_id(1).to(tl.int64)
    partner = view
    if CROSS:
        partner = 1 - view
    r += partner * rows * ld
    kappa += partner * rows
    z += view * z_view
    other += partner * z_view
    if own is not None:
        own += view * own_view
    if inverse is not None:
        inverse += view * columns
    if sums is not None:
        sums += view * row_blocks * 2 * columns
    if view == 1:
        out = second
        difference = -difference
    i = row * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)
    left = tl.minimum(i, rows - 1).to(tl.int64) * ld
    right = (j.to(tl.int64) * z_column)[None, :]
    within = (j < columns)[None, :]
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(r + left[:, None] + k[None, :], mask=(k < rows)[None, :], other=0.0)
        b = tl.load(z + (k.to(tl.int64) * z_row)[:, None] + right, mask=(k < rows)[:, None] & within, other=0.0)
        g = dot(a, b.to(a.dtype), g, PRECISION)
    width: tl.constexpr = BLOCK_N // 4
    pairs = halves(g * scale)
    for p in tl.static_range(2):
        quarters = halves(pairs[p])
        for q in tl.static_range(2):
            j = column * BLOCK_N + (2 * p + q) * width + tl.arange(0, width)
            finish_products(
                quarters[q], i, j, kappa, z, other, own, inverse, x, y, out, sums, row,
                rows, columns, z_row, z_column, other_row, other_column, x_row, x_column, y_row, y_column,
                factor, difference, WHOLE,
            )  # fmt: skip
