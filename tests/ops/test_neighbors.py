# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from sslkernels.reference.neighbors import koleo


def formula(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Written out by hand, row by row."""
    u = x / x.norm(dim=1, keepdim=True).clamp(min=eps)
    logs = []
    for i in range(len(u)):
        others = [j for j in range(len(u)) if j != i]
        nearest = max(others, key=lambda j: (u[i] @ u[j]).item())
        logs.append((((u[i] - u[nearest] + eps).square().sum()).sqrt() + eps).log())
    return -torch.stack(logs).mean()


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (7, 3), (31, 16)], ids=str)
def test_koleo_is_the_formula(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    loss, expected = koleo(x), formula(y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_koleo_pushes_neighbours_apart():
    """One step against the gradient moves the closest pair apart; rows that are nobody's neighbour count once."""
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    koleo(x).backward()
    assert koleo(x.detach() - 0.01 * x.grad) < koleo(x.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_koleo_of_equal_rows_is_finite(dtype):
    """In float16 an eps of 1e-8 is zero, and the logarithm of equal rows infinite; -1 of a diagonal is no neighbour."""
    x = torch.randn(384).to(dtype).repeat(4, 1).requires_grad_()
    loss = koleo(x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), -math.log(1e-8 * (math.sqrt(384) + 1)), rtol=1e-3, atol=0)
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert koleo(torch.zeros(3, 8, dtype=dtype)).isfinite()


def test_koleo_accumulates_in_float32():
    """bfloat16 rows at a distance of 0.02, which bfloat16 products could not tell from 0."""
    torch.manual_seed(0)
    base = torch.randn(8, 64)
    x = torch.cat([base, base + 0.02 * torch.randn(8, 64)]).bfloat16()
    torch.testing.assert_close(koleo(x).double(), formula(x.double()), rtol=1e-4, atol=0)


def test_koleo_propagates_nan_and_refuses():
    x = torch.randn(4, 3)
    x[1, 1] = torch.nan
    assert koleo(x).isnan()
    for wrong in (torch.zeros(1, 3), torch.zeros(3), torch.zeros(2, 2, 2)):
        with pytest.raises(ValueError, match="at least 2 rows"):
            koleo(wrong)
