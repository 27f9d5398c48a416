# SPDX-License-Identifier: Apache-2.0
"""Rows scaled to unit length, and the gradient through it: one program a row, in pieces that fit its registers."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._launch import launch, shape


@triton.jit
def normalize_kernel(x, z, norm, eps, columns, row_stride, column_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    z += row * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(x + c.to(tl.int64) * column_stride, mask=c < columns, other=0.0).to(tl.float32)
        total += value * value
    length = tl.sqrt_rn(tl.sum(total, 0))
    tl.store(norm + row, length)
    # NaN is neither above nor below eps: it must come out as NaN
    divisor = tl.where(length < eps, eps, length)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(x + c.to(tl.int64) * column_stride, mask=c < columns, other=0.0).to(tl.float32)
        tl.store(z + c, (value / divisor).to(z.dtype.element_ty), mask=c < columns)


@triton.jit
def normalize_backward_kernel(grad, z, norm, dx, eps, columns, row_stride, column_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    grad += row * row_stride
    z += row * columns
    dx += row * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        g = tl.load(grad + c.to(tl.int64) * column_stride, mask=c < columns, other=0.0).to(tl.float32)
        total += g * tl.load(z + c, mask=c < columns, other=0.0).to(tl.float32)
    length = tl.load(norm + row)
    # a row shorter than eps was divided by a constant
    along = tl.where(length > eps, tl.sum(total, 0), 0.0)
    divisor = tl.where(length < eps, eps, length)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        g = tl.load(grad + c.to(tl.int64) * column_stride, mask=c < columns, other=0.0).to(tl.float32)
        value = tl.load(z + c, mask=c < columns, other=0.0).to(tl.float32)
        tl.store(dx + c, ((g - along * value) / divisor).to(dx.dtype.element_ty), mask=c < columns)


def l2_normalize(xs, eps):
    rows, columns = sum(x.shape[0] for x in xs), xs[0].shape[1]
    z, norm = xs[0].new_empty(rows, columns), xs[0].new_empty(rows, dtype=torch.float32)
    begin = 0
    for x in xs:
        end = begin + x.shape[0]
        operands = x, z[begin:end], norm[begin:end], eps, columns, *x.stride()
        launch(normalize_kernel, (x.shape[0],), *operands, **shape("row", x))
        begin = end
    return z, norm


def l2_normalize_backward(grad, z, norm, eps):
    dx = torch.empty_like(z)
    operands = grad, z, norm, dx, eps, z.shape[1], *grad.stride()
    launch(normalize_backward_kernel, (z.shape[0],), *operands, **shape("row", z))
    return dx
