# SPDX-License-Identifier: Apache-2.0
"""The correlation ops on a GPU; signatures are the schemas'. What bounds them: docs/gpu.md, "correlation".

The space depends on the shapes alone: the sums that would show a norm that is nearly all diagonal stay on the device.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.triton._correlation_columns import (
    blend_kernel,
    correlation_columns_kernel,
    covariance_columns_kernel,
    finish_kernel,
    product_columns_kernel,
    total_kernel,
)
from sslkernels.triton._correlation_features import feature_products
from sslkernels.triton._correlation_grams import gram_close_kernel, gram_gradient_kernel, gram_kernel
from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._tiles import precision


def product_frobenius(a, b, off_diagonal, output_mask):
    other = a if b is None else b
    da, db = _empty(a, output_mask[0]), _empty(other, output_mask[1])
    value = a.new_empty((), dtype=torch.float32)
    if a.numel() == 0 or other.numel() == 0:
        return value.zero_(), da.zero_(), db.zero_()
    n, d = a.shape
    narrow = a.element_size() == other.element_size() == 2
    # norms of float16 rows may leave the range of float16
    dtype = torch.bfloat16 if narrow else torch.float32
    factor = 4.0 if b is None else 2.0
    if not _gram_space(n, d, other.shape[1]):
        wanted = (da if output_mask[0] else None, db if output_mask[1] else None)
        norms = feature_products(a, other, wanted, dtype, factor, off_diagonal)
        _total(value, None, norms, 1.0)
        return value, da, db
    own = sums = None
    if off_diagonal:
        own, sums, grid, tile = _column_outputs(a, 1)
        sizes = n, d, *a.stride(), *other.stride(), factor
        launch(product_columns_kernel, grid, a, other, own, sums, *sizes, **tile)
    views = [a[None]] if b is None else [a[None], b[None]]
    grams = _grams(views, b is not None, dtype if any(output_mask) else None, 1.0)
    for v, (x, partner, out) in enumerate(((a, other, da), (other, a, db))):
        if output_mask[v]:
            of = len(views) - 1 - v
            _launch_gradient(grams.r[of], grams.kappa[of], x, partner, own, (out, out), factor, factor)
    _total(value, sums, grams.norms, 1.0)
    return value, da, db


def two_view_correlation(x, y, lambda_param, eps, output_mask):
    n, d = x.shape
    gram = _gram_space(n, d, d)
    dtype = _treated_dtype(x, y, torch.float16)  # a standardised column's range is known
    factor = 2 * lambda_param / n**2
    z = x.new_empty(2, n, d, dtype=dtype)
    inverse = x.new_empty(2, d, dtype=torch.float32)
    own, sums, grid, tile = _column_outputs(x, 1)
    sizes = n, d, *x.stride(), *y.stride(), eps, factor
    launch(correlation_columns_kernel, grid, x, y, z[0], z[1], inverse, own, sums, *sizes, SUBTRACT=gram, **tile)
    value, outs = _outputs(x, output_mask)
    if gram:
        unit = 2.0 ** -(d - 1).bit_length() if dtype == torch.float16 else 1.0
        grams = _grams([z], True, dtype if any(output_mask) else None, unit)
        norms = grams.norms
        narrow = torch.bfloat16 if x.dtype == y.dtype == torch.bfloat16 else None
        _gram_gradients(grams, z, own, outs, output_mask, factor, inverse=inverse, narrow=narrow)
    else:
        wanted = [out if w else None for w, out in zip(output_mask, outs)]
        norms = feature_products(z[0], z[1], wanted, dtype, 1 / n, True)
        for v, out in enumerate(outs):
            if output_mask[v]:
                _blend(out, z[v], z[1 - v], own, factor * n, inverse=inverse[v])
    _total(value, sums, norms, lambda_param / n**2)
    return value, *outs


def two_view_covariance(x, y, weights, gamma, eps, output_mask):
    (n, d), (invariance, spread, covariance) = x.shape, weights
    gram = _gram_space(n, d, d)
    dtype = _treated_dtype(x, y, torch.bfloat16)
    factor, difference = 4 * covariance / (d * (n - 1) ** 2), 2 * invariance / (n * d)
    z = x.new_empty(2, n, d, dtype=dtype)
    own, sums, grid, tile = _column_outputs(x, 2)
    numbers = eps, gamma, invariance / (n * d), spread / d, factor
    sizes = n, d, *x.stride(), *y.stride(), *numbers
    launch(covariance_columns_kernel, grid, x, y, z[0], z[1], own, sums, *sizes, SUBTRACT=gram, **tile)
    value, outs = _outputs(x, output_mask)
    if gram:
        grams = _grams([z], False, dtype if any(output_mask) else None, 1.0)
        norms = grams.norms
        _gram_gradients(grams, z, own, outs, output_mask, factor, apart=(x, y, difference))
    else:
        parts = []
        for v, out in enumerate(outs):
            wanted = out if output_mask[v] else None, None
            parts.append(feature_products(z[v], z[v], wanted, dtype, 1 / (n - 1), True))
            if output_mask[v]:
                apart = x, y, difference if v == 0 else -difference
                _blend(out, z[v], z[v], own[v], factor * (n - 1), apart=apart)
        norms = torch.cat(parts)
    _total(value, sums, norms, covariance / (d * (n - 1) ** 2))
    return value, *outs


ALIKE = None, None, 0.0  # no term of the difference of the views


class _Grams(NamedTuple):
    r: Tensor  # (views, N, ld): unit K without its diagonal
    kappa: Tensor  # (views, N): the diagonal
    norms: Tensor  # partial sums, float64
    unit: float


def _gram_space(n: int, d: int, e: int) -> bool:
    """Symmetric halves make it N^2 (D + E) multiplications against N D E, in forward and backward alike."""
    return n * (d + e) <= d * e


def _treated_dtype(x: Tensor, y: Tensor, narrow: torch.dtype) -> torch.dtype:
    return narrow if x.element_size() == y.element_size() == 2 else torch.float32


def _empty(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,), dtype=torch.float32)


def _outputs(x: Tensor, output_mask) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty((), dtype=torch.float32), [_empty(x, wanted) for wanted in output_mask]


def _column_outputs(x: Tensor, slopes: int):
    """Room for the slopes of the columns and for the programs' sums; the grid and the tile that fill it."""
    tile = shape("correlation_columns", x)
    d = x.shape[1]
    programs = cdiv(d, tile["BLOCK_C"])
    own = x.new_empty((slopes, d) if slopes > 1 else (d,), dtype=torch.float32)
    return own, x.new_empty(2, programs, dtype=torch.float64), (programs,), tile


def _grams(views: list[Tensor], cross: bool, dtype: torch.dtype | None, unit: float) -> _Grams:
    """The matrices K of views (V, N, D) and their inner product, or their norms; no dtype: only that."""
    n, widest, count = views[0].shape[1], max(z.shape[2] for z in views), sum(len(z) for z in views)
    tile = shape("correlation_gram", *views)
    side = tile["BLOCK_M"]
    blocks = cdiv(n, side)
    tiles = blocks * (blocks + 1) // 2
    # four programs a multiprocessor even out; each multiplies at least eight blocks of columns
    parts = max(1, min(cdiv(4 * multiprocessors(views[0]), tiles * count), widest // (8 * tile["BLOCK_K"])))
    out = views[0].new_empty(parts, count, tiles, side * side, dtype=torch.float32)
    begin = 0
    for z in views:
        chunk = cdiv(cdiv(z.shape[2], parts), tile["BLOCK_K"]) * tile["BLOCK_K"]
        sizes = n, z.shape[2], *z.stride(), out.stride(0), chunk
        launch(gram_kernel, (tiles, parts, len(z)), z, out[:, begin:], *sizes, PRECISION=precision(), **tile)
        begin += len(z)
    close = shape("correlation_close", *views)
    pieces = tiles * (side // close["BLOCK_R"])
    ld = cdiv(n, 16) * 16
    norms = out.new_empty(count, pieces, dtype=torch.float64)
    # nobody wants a gradient: no room for its operands
    r, kappa = out.new_empty(count if dtype else 0, n, ld, dtype=dtype), out.new_empty(count, n)
    numbers = n, ld, parts, out.stride(0), tiles, unit
    operands = out, r if dtype else None, kappa, norms
    launch(gram_close_kernel, (pieces, count), *operands, *numbers, CROSS=cross, BLOCK_M=side, **close)
    return _Grams(r, kappa, norms, unit)


def _gram_gradients(grams, z, own, outs, output_mask, factor, *, inverse=None, narrow=None, apart=ALIKE):
    """The gradients of the treated views z (2, N, D), with `inverse` of the views before standardising, by way of
    memory of the dtype `narrow` where it is given; without it K is that of the view itself."""
    if not any(output_mask):
        return
    _, n, d = z.shape
    first, cross = int(not output_mask[0]), inverse is not None
    tile = shape("correlation_gradient", z)
    whole, sums = False, None
    if cross:
        all_rows = shape("correlation_gradient_whole", z)
        whole = n <= all_rows["BLOCK_M"]
        tile = all_rows if whole else tile
        if not whole:
            sums = z.new_empty(2, cdiv(n, tile["BLOCK_M"]), 2, d, dtype=torch.float32)
    places = outs if sums is None or narrow is None else z.new_empty(2, n, d, dtype=narrow)
    _launch_gradient(
        grams.r, grams.kappa, z[0], z[0], own, places, factor / grams.unit, factor, inverse=inverse, sums=sums,
        apart=apart, first=first, views=sum(output_mask), z_view=z.stride(0), own_view=d if own.ndim == 2 else 0,
        cross=cross, whole=whole, tile=tile,
    )  # fmt: skip
    for v, out in enumerate(outs):
        if sums is not None and output_mask[v]:
            _finish(places[v], z[v], grams.kappa[1 - v], sums[v], inverse[v], out, factor)


def _launch_gradient(
    r, kappa, z, other, own, outs, scale, factor, *, inverse=None, sums=None, apart=ALIKE,
    first=0, views=1, z_view=0, own_view=0, cross=False, whole=False, tile=None,
):  # fmt: skip
    tile = tile or shape("correlation_gradient", r, z)
    (n, d), (x, y, difference) = z.shape, apart
    programs = cdiv(n, tile["BLOCK_M"]) * cdiv(d, tile["BLOCK_N"])
    sizes = n, d, r.stride(-2), *z.stride(), *other.stride(), *_strides(x, y), first, z_view, own_view
    launch(
        gram_gradient_kernel, (programs, views),
        r, kappa, z, other, own, inverse, x, y, *outs, sums, *sizes, scale, factor, difference,
        CROSS=cross, WHOLE=whole, PRECISION=precision(), **tile,
    )  # fmt: skip


def _blend(g, z, other, own, factor, *, inverse=None, apart=ALIKE):
    """The gradient before standardising or centring, in place, from g = the products in feature space."""
    n, d = g.shape
    tile = shape("correlation_elements", g)
    grid = cdiv(n, tile["BLOCK_R"]), cdiv(d, tile["BLOCK_C"])
    sums = None if inverse is None else g.new_empty(grid[0], 2, d)
    x, y, difference = apart
    strides = _strides(x, y)
    launch(blend_kernel, grid, g, z, other, own, x, y, sums, n, d, *strides, factor, difference, **tile)
    if sums is not None:
        _finish(g, z, None, sums, inverse, g, 0.0)


def _strides(x, y):
    return (0, 0, 0, 0) if x is None else (*x.stride(), *y.stride())


def _finish(g, z, kappa, sums, inverse, out, factor):
    n, d = z.shape
    tile = shape("correlation_elements", z)
    grid = cdiv(n, tile["BLOCK_R"]), cdiv(d, tile["BLOCK_C"])
    launch(finish_kernel, grid, g, z, kappa, sums, inverse, out, n, d, len(sums), factor, **tile)


def _total(value, sums, norms, scale):
    programs = 0 if sums is None else sums.shape[1]
    launch(total_kernel, (1,), value, sums, norms, programs, norms.numel(), scale, **shape("correlation_total", value))
