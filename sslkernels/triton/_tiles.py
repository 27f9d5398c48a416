# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: products of tiles, loads at 64-bit offsets, numbers on the device."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# In the interpreter of Triton 3.6 and 3.9 a product of bfloat16 tiles is garbage.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def precision() -> str:
    """How float32 operands are multiplied: exactly, or as tf32 where torch allows it, by whichever of its settings."""
    # torch.get_float32_matmul_precision raises where the user has chosen by fp32_precision; this follows both
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def scalar(pointer, value):
    """A number that came as a tensor of one element, of any floating dtype, or as itself where the pointer is None."""
    if pointer is not None:
        value = tl.load(pointer).to(tl.float32)
    return value


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_count, column_count):
    """A tile (rows, columns) of a strided matrix; zeros outside of it."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    return tl.load(pointer + offsets, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b in float32; mixed operands meet in the wider dtype."""
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0, exact to a few roundings also where x is small."""
    s = x / (x + 2)
    q = s * s
    series = q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15))))
    series = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + series))))
    return tl.where(x <= 1, series, tl.log(1 + x))
