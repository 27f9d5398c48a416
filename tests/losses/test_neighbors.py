# SPDX-License-Identifier: Apache-2.0
"""KoLeo: as written out row by row and as lightly's module, and what becomes of rows that have no way apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.losses import KoLeoLoss, koleo_loss
from sslkernels.reference.neighbors import koleo

FORMS: dict[str, Callable[[Tensor], Tensor]] = {"loss": koleo_loss, "reference": koleo, "module": KoLeoLoss()}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return FORMS[request.param]


def formula(x: Tensor, p: float = 2.0, eps: float = 1e-8) -> Tensor:
    """Written out by hand, row by row."""
    u = x / x.norm(dim=1, keepdim=True).clamp(min=eps)
    logs = []
    for i in range(len(u)):
        others = [j for j in range(len(u)) if j != i]
        nearest = max(others, key=lambda j: (u[i] @ u[j]).item())
        logs.append(((u[i] - u[nearest] + eps).abs().pow(p).sum().pow(1 / p) + eps).log())
    return -torch.stack(logs).mean()


def lightly(x: Tensor, p: float = 2.0, eps: float = 1e-8) -> Tensor:
    """The arithmetic of its module, restated."""
    u = F.normalize(x, p=2, dim=-1, eps=eps)
    nearest = (u @ u.T).fill_diagonal_(-2).argmax(dim=1)
    return -(F.pairwise_distance(u, u[nearest], p, eps) + eps).log().mean()


def value_and_grad(function: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (7, 3), (31, 16), (300, 33)], ids=str)
def test_is_the_formula(shape: tuple[int, int], form: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(value_and_grad(form, x), value_and_grad(formula, x))
    torch.testing.assert_close(value_and_grad(form, x), value_and_grad(lightly, x))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_other_norms_and_eps(p: float) -> None:
    x = torch.randn(9, 5, dtype=torch.float64)

    def expected(x: Tensor) -> Tensor:
        return formula(x, p, 1e-3)

    torch.testing.assert_close(value_and_grad(KoLeoLoss(p, 1e-3), x), value_and_grad(expected, x))


def test_gradcheck() -> None:
    torch.autograd.gradcheck(koleo_loss, torch.randn(6, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype: torch.dtype) -> None:
    """Computed in float32 whatever came: rows 0.02 apart, which bfloat16 products could not tell from equal."""
    base = torch.randn(24, 64)
    x = torch.cat([base, base + 0.02 * torch.randn(24, 64)]).to(dtype)
    value, grad = value_and_grad(koleo_loss, x)
    exact, exact_grad = value_and_grad(formula, x.double())
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    error = (grad.double() - exact_grad).norm() / exact_grad.norm()
    assert error <= torch.finfo(dtype).eps + 2e-5


def test_a_step_pushes_neighbors_apart(form: Callable[[Tensor], Tensor]) -> None:
    """Rows that are nobody's neighbour count once."""
    x = torch.randn(12, 4, dtype=torch.float64)
    loss, grad = value_and_grad(form, x)
    assert form(x - 0.01 * grad) < loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_equal_rows(dtype: torch.dtype, form: Callable[[Tensor], Tensor]) -> None:
    """In float16 an eps of 1e-8 is zero, and the logarithm of equal rows infinite; -1 of a diagonal is no neighbour."""
    x = torch.randn(384).to(dtype).repeat(5, 1)
    loss, grad = value_and_grad(form, x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), -math.log(1e-8 * (math.sqrt(384) + 1)), rtol=1e-3, atol=0)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_duplicates_among_others_have_the_gradient_of_the_others(
    dtype: torch.dtype, form: Callable[[Tensor], Tensor]
) -> None:
    """Two equal rows are each other's neighbours: their pairs push opposite ways and cancel in the formula too."""
    x = torch.randn(10, 32).to(dtype)
    x[7] = x[2]
    loss, grad = value_and_grad(form, x)
    exact, exact_grad = value_and_grad(formula, x.double())
    assert loss.isfinite() and grad.isfinite().all()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-4)
    x[8] = x[2]  # the third pulls in the formula: 1 / (eps (D + sqrt(D)) N) in each component
    loss, grad = value_and_grad(form, x)
    assert loss.isfinite() and grad.abs().max() < 10
    assert value_and_grad(formula, x.double())[1].abs().max() > 1e4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_of_zeros(dtype: torch.dtype, form: Callable[[Tensor], Tensor]) -> None:
    """1 / eps is 1e8, which float16 cannot hold; nobody is pushed by a row without a direction."""
    loss, grad = value_and_grad(form, torch.zeros(6, 32, dtype=dtype))
    assert loss.isfinite() and not grad.any()
    x = torch.randn(12, 32).to(dtype)
    x[3] = 0
    loss, grad = value_and_grad(form, x)
    exact, exact_grad = value_and_grad(formula, x.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert grad.isfinite().all() and not grad[3].any()
    others = torch.arange(12) != 3
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(grad[others].double(), exact_grad[others], **tolerance)


def test_nan_shows(form: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 3)
    x[1, 1] = torch.nan
    assert form(x).isnan()


def test_module() -> None:
    assert repr(KoLeoLoss()) == "KoLeoLoss(p=2, eps=1e-08)"
    assert not KoLeoLoss().state_dict()


def test_autocast_and_compile() -> None:
    torch._dynamo.reset()
    x = torch.randn(40, 16)
    expected = value_and_grad(koleo_loss, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value_and_grad(koleo_loss, x), expected)
    compiled = torch.compile(koleo_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, x), expected)


def test_repeats_bit_for_bit(threads: int) -> None:
    x = torch.randn(700, 32)
    first, again = (value_and_grad(koleo_loss, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: koleo_loss(torch.zeros(1, 3)), ValueError, "x must have at least 2 rows, got shape"),
        (lambda: koleo_loss(torch.zeros(3)), ValueError, "x must be 2-D"),
        (lambda: koleo_loss(torch.zeros(2, 2, 2)), ValueError, "x must be 2-D"),
        (lambda: koleo_loss(torch.zeros(2, 2).int()), TypeError, "x must have a floating dtype"),
        (lambda: koleo_loss(torch.zeros(2, 2), eps=0.0), ValueError, "eps must be positive"),
        (lambda: KoLeoLoss(p=0.5), ValueError, "p must be in"),
        (lambda: KoLeoLoss(eps=-1.0), ValueError, "eps must be positive"),
        (lambda: koleo(torch.zeros(1, 3)), ValueError, "at least 2 rows"),
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
