# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of standardize and its gradient, thread by thread on the CPU, against float64. No GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.reference import _correlation as reference

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# columns: of one, of a thread's two, about a strip's 32 and 64, and more than two strips, which one launch takes.
# rows: one, less and more than a warp's 8 and a block's 128, and enough for several parts.
SHAPES = [(1, 3), (7, 2), (9, 33), (129, 65), (130, 1), (300, 31), (600, 64), (257, 200)]


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a part of the largest element."""
    assert got.isfinite().all()
    error = (got.double() - expected).abs().amax()
    assert float(error) <= tolerance * float(expected.abs().amax().clamp(min=1))


def both(emulated: Callable, x: Tensor, grad: Tensor, tolerance: float, unbiased: bool = False) -> None:
    z, moments = emulated("standardize", x, 1e-5, unbiased)
    expected, exact = reference.standardize_forward(x.double(), 1e-5, unbiased)
    assert (z.dtype, z.shape, z.is_contiguous()) == (x.dtype, x.shape, True)
    assert moments.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    close(z, expected, tolerance)
    close(moments[0].double() + moments[1].double(), exact[0] + exact[1], 1e-6)
    dx = emulated("standardize_backward", grad, x, moments, unbiased)
    assert (dx.dtype, dx.shape, dx.is_contiguous()) == (x.dtype, x.shape, True)
    close(dx, reference.standardize_backward(grad.double(), x.double(), exact, unbiased), tolerance)
    again = emulated("standardize", x, 1e-5, unbiased)
    assert torch.equal(z, again[0]) and torch.equal(moments, again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: f"{x[0]}x{x[1]}")
def test_against_float64(emulated: Callable, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad = (3 + 2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    both(emulated, x, grad, DTYPES[dtype], unbiased=shape[0] > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides(emulated: Callable, dtype: torch.dtype) -> None:
    wide, tall = torch.randn(40, 131).to(dtype), torch.randn(65, 40).to(dtype)
    grad = torch.randn(40, 65).to(dtype)
    for x in (wide[:, 1:66], wide[:, ::2][:, :65], tall.t(), torch.randn(80, 65).to(dtype)[::2]):
        both(emulated, x, grad, DTYPES[dtype])
        both(emulated, grad, x, DTYPES[dtype])
    both(emulated, grad, torch.randn(()).to(dtype).expand(40, 65), DTYPES[dtype])


@pytest.mark.parametrize("rows", [64, 600])
def test_columns_far_from_zero(emulated: Callable, rows: int) -> None:
    """A mean of 1e4 and a deviation of 1e-2 keep the digits that float32 has of such numbers; an outlier costs none."""
    x = 1e4 + 1e-2 * torch.randn(rows, 5)
    both(emulated, x, torch.randn(rows, 5), 1e-5)
    x = torch.randn(rows, 5)
    x[0] = 1e4
    both(emulated, x, torch.randn(rows, 5), 1e-5)


def test_constant_columns_are_zero(emulated: Callable) -> None:
    z, moments = emulated("standardize", torch.full((300, 3), 0.1), 1e-5, False)
    assert not z.any()
    torch.testing.assert_close(moments[2], torch.full((3,), 1e-5).rsqrt())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [20, 600])
def test_nan_stays_in_its_column(emulated: Callable, value: float, rows: int) -> None:
    x = torch.randn(rows, 5)
    expected = emulated("standardize", x, 1e-5, False)[0]
    x[rows // 2, 2] = value
    z, moments = emulated("standardize", x, 1e-5, False)
    dx = emulated("standardize_backward", torch.ones_like(x), x, moments, False)
    others = [0, 1, 3, 4]
    assert z[:, 2].isnan().all() and dx[:, 2].isnan().all()
    assert torch.equal(z[:, others], expected[:, others]) and dx[:, others].isfinite().all()


def test_empty(emulated: Callable) -> None:
    z, moments = emulated("standardize", torch.zeros(5, 0), 1e-5, False)
    assert z.shape == (5, 0) and moments.shape == (3, 0)
    assert emulated("standardize_backward", z, z, moments, False).shape == (5, 0)
