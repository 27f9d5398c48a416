# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of columns, by one program for all rows."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._tiles import load_tile


@triton.jit
def moments(x, columns, row_count, column_count, row_stride, column_stride, BLOCK_R: tl.constexpr):
    """Of each column (shift, rest, variance), with mean = shift + rest.

    The shift is the mean of the first rows, which lies within sqrt(rows / BLOCK_R) deviations of the mean: squares
    about it cannot cancel further.
    """
    rows = tl.arange(0, BLOCK_R)
    few = tl.minimum(row_count, BLOCK_R)
    value = load_tile(x, rows, columns, row_stride, column_stride, row_count, column_count).to(tl.float32)
    shift = tl.sum(value, 0) / few
    total = tl.zeros_like(value)
    square = tl.zeros_like(value)
    for start in range(0, row_count, BLOCK_R):
        value = load_tile(x, start + rows, columns, row_stride, column_stride, row_count, column_count).to(tl.float32)
        away = tl.where((start + rows < row_count)[:, None], value - shift[None, :], 0.0)
        total += away
        square += away * away
    rest = tl.sum(total, 0) / row_count
    variance = tl.sum(square, 0) / row_count - rest * rest
    return shift, rest, tl.where(variance < 0, 0.0, variance)


@triton.jit
def centered(x, rows, columns, shift, rest, row_count, column_count, row_stride, column_stride):
    """A tile without the means of its columns; zeros outside."""
    value = load_tile(x, rows, columns, row_stride, column_stride, row_count, column_count).to(tl.float32)
    return tl.where((rows < row_count)[:, None], (value - shift[None, :]) - rest[None, :], 0.0)
