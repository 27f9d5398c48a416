# SPDX-License-Identifier: Apache-2.0
"""Feature space: C = a^T b in panels of rows, its squared norm, and the gradients that the panels give.

A panel of C is formed by Triton, which squares and zeroes the diagonal in registers, and stays in the L2 cache
(D = 8192: 2,048 rows, 32 MiB in 16 bits); the two products with it, 4 N D E of the 6 N D E operations, are torch's own.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._panel import PANEL_BYTES, add_product, panels, product
from sslkernels.triton._scores import grouped
from sslkernels.triton._tiles import dot, precision

STORED = 4 << 20  # bytes of a C that may be stored whole


@triton.jit
def feature_kernel(
    a, b, panel, norms, rows, columns, others, a_row, a_column, b_row, b_column, first, scale,
    OFF_DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of c = a^T b, the sum of its squares, and panel = scale c; row d of `a`'s columns is C's row first + d."""
    row, column = grouped(tl.program_id(0), tl.cdiv(columns, BLOCK_M), tl.cdiv(others, BLOCK_N), 8)
    d = row * BLOCK_M + tl.arange(0, BLOCK_M)
    e = column * BLOCK_N + tl.arange(0, BLOCK_N)
    left = (d.to(tl.int64) * a_column)[None, :]
    right = (e.to(tl.int64) * b_column)[None, :]
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        u = tl.load(
            a + (n.to(tl.int64) * a_row)[:, None] + left, mask=(n < rows)[:, None] & (d < columns)[None, :], other=0.0
        )
        v = tl.load(
            b + (n.to(tl.int64) * b_row)[:, None] + right, mask=(n < rows)[:, None] & (e < others)[None, :], other=0.0
        )
        c = dot(tl.trans(u), v, c, PRECISION)
    if OFF_DIAGONAL:
        c = tl.where((first + d)[:, None] == e[None, :], 0.0, c)
    wide = c.to(tl.float64)
    tl.store(norms + tl.program_id(0), tl.sum(tl.sum(wide * wide, 1), 0))
    if panel is not None:
        inside = (d < columns)[:, None] & (e < others)[None, :]
        offsets = d[:, None].to(tl.int64) * others + e[None, :]
        tl.store(panel + offsets, (c * scale).to(panel.dtype.element_ty), mask=inside)


def feature_products(a, b, outs, dtype, scale, off_diagonal):
    """Partial sums of ||C||^2; outs = scale b C^T and scale a C, float32, where they are not None.

    `dtype` is that of a panel and of the operands of the gradients' products, which are copied if they have another.
    """
    rows, columns, others = a.shape[0], a.shape[1], b.shape[1]
    tile = shape("correlation_features", a, b)
    blocks = cdiv(others, tile["BLOCK_N"])
    da, db = outs
    wanted = da is not None or db is not None
    limit = min(PANEL_BYTES, max(STORED, columns * others * dtype.itemsize // 4))
    parts = list(panels(columns, others, dtype, limit)) if wanted else [slice(0, columns)]
    heights = [part.stop - part.start for part in parts]
    counts = [cdiv(height, tile["BLOCK_M"]) * blocks for height in heights]
    norms = a.new_empty(sum(counts), dtype=torch.float64)
    panel = a.new_empty(max(heights) if wanted else 0, others, dtype=dtype)
    left, right = (x if x.dtype == dtype or not wanted else x.to(dtype) for x in (a, b))
    begin = 0
    for part, height, count in zip(parts, heights, counts):
        operands = a[:, part], b, panel if wanted else None, norms[begin : begin + count]
        sizes = rows, height, others, *a.stride(), *b.stride(), part.start, scale
        launch(feature_kernel, (count,), *operands, *sizes, OFF_DIAGONAL=off_diagonal, PRECISION=precision(), **tile)
        if da is not None:
            product(right, panel[:height].T, out=da[:, part])
        if db is not None:
            add_product(db, left[:, part], panel[:height], first=part.start == 0)
        begin += count
    return norms
