# SPDX-License-Identifier: Apache-2.0
"""Where sums cancel: whitened batches, far means, constant columns, columns of very different size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from correlation_cases import OPS, SCALARS, batch_norm, check, eager, evaluate, views
from torch import Tensor

from sslkernels import _library, ops

built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


def check_contract(name: str, xs: Sequence[Tensor], floor: float = 0.0) -> None:
    """Value (relative) and gradients (by norm): twice eager's error and a few roundings of the result, no more."""
    exact = evaluate(OPS[name].written_out, [x.double() for x in xs])
    for got, want, usual in zip(evaluate(OPS[name].ours, xs), exact, eager(OPS[name], xs), strict=True):
        error, usual_error = ((x.double() - want).norm() / want.norm() for x in (got, usual))
        last = torch.finfo(got.dtype).eps if got.ndim else 0.0
        assert error <= 2 * usual_error + last + 4 * torch.finfo(torch.float32).eps + floor, (error, usual_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 512), (256, 512), (300, 600), (512, 512), (700, 90)], ids=str)
@pytest.mark.parametrize("name", SCALARS)
def test_contract(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    xs = views(*shape, OPS[name].views, dtype=dtype)
    if dtype == torch.float16 and name.startswith("a^T"):
        xs = tuple(x / 64 for x in xs)  # eager's products, and gradients, leave the range of float16
    check_contract(name, xs)


def whitened(n: int, d: int) -> Tensor:
    """Columns of mean zero and deviation one, uncorrelated to the last bit of float64."""
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, d)], 1).double()).Q
    return basis[:, 1:] * n**0.5


@pytest.mark.parametrize("name", ["a^T a off", "a^T b off"])
@pytest.mark.parametrize("d", [16, 96, 200])
def test_whitened_batch(name: str, d: int) -> None:
    """N = 8 D: what correlation is left is 1e-3 of the diagonal, and none of it is lost by a subtraction."""
    n = 8 * d
    z = whitened(n, d)
    mix = torch.eye(d, dtype=torch.float64) + 1e-3 / d**0.5 * torch.randn(d, d, dtype=torch.float64)
    xs = tuple((z @ mix * (0.5 + torch.rand(d))).float() for _ in range(OPS[name].views))
    value = evaluate(OPS[name].ours, xs)[0].double()
    truth = [x.double() for x in xs]
    exact = OPS[name].written_out(*truth)
    total = (truth[0].T @ truth[-1]).square().sum()
    assert exact < 1e-4 * total  # a difference of float32 sums would be rounding
    # entries of C are rounded by eps |a_i| |b_j| and less, of which what is left of them is a thousandth
    assert (value - exact).abs() <= 2e-4 * exact
    check_contract(name, xs)


def test_subtraction_would_fail_the_whitened_batch() -> None:
    """The test above can fail: the Gram form in float32 is wrong by more than it allows."""
    d, n = 200, 1600
    x = (whitened(n, d) @ (torch.eye(d) + 1e-3 / d**0.5 * torch.randn(d, d)).double()).float()
    gram = x @ x.T
    difference = gram.square().sum() - x.square().sum(0).square().sum()
    exact = OPS["a^T a off"].written_out(x.double())
    assert (difference.double() - exact).abs() > 1e-2 * exact


@pytest.mark.parametrize("name", ["a^T a off", "a^T b off", "two_view_covariance"])
@pytest.mark.parametrize("shape", [(40, 100), (100, 400)], ids=str)
def test_one_column_dwarfs_the_others(name: str, shape: tuple[int, int]) -> None:
    """In Gram space the norm would be all diagonal, and the rest its rounding: then C is taken entry by entry."""
    xs = views(*shape, OPS[name].views)
    for x in xs:
        x[:, 7] = 3000 * torch.randn(shape[0])
    check_contract(name, xs)


def test_most_columns_dead() -> None:
    """Constant columns are zeros after standardising: few columns are left, and many rows beside them."""
    x, y = views(200, 400)
    x[:, 10:], y[:, 10:] = 0.25, -3.0
    exact = evaluate(OPS["two_view_correlation"].written_out, (x.double(), y.double()))
    for got, want in zip(evaluate(ops.two_view_correlation, (x, y)), exact):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("value", [0.1, 1e4, 3.7e-3, -12345.678])
def test_constant_columns(value: float) -> None:
    x = torch.randn(50, 30)
    x[:, 5] = value
    z, grad = evaluate_standard(x)
    assert not z[:, 5].any()
    assert grad.isfinite().all()
    loss = ops.two_view_covariance(x, x, covariance=0.0, invariance=0.0)
    std = (x.double().var(0) + 1e-4).sqrt()
    assert loss.item() == pytest.approx(2 * 25 * F.relu(1 - std).mean().item(), rel=1e-6)


def evaluate_standard(x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    z = ops.standardize(leaf)
    (grad,) = torch.autograd.grad(z, leaf, torch.randn(x.shape).to(z.dtype))
    return z.detach(), grad


@pytest.mark.parametrize("shape", [(256, 64), (1000, 7), (20, 300)], ids=str)
def test_far_mean_and_small_deviation(shape: tuple[int, int]) -> None:
    """Mean 1e4, deviation 1e-2: ten times the spacing of float32 there, and nothing of it is lost."""
    x = 1e4 + 1e-2 * torch.randn(shape)
    z = ops.standardize(x)
    exact = batch_norm(x.double())
    assert (z.double() - exact).norm() <= 4e-7 * exact.norm()
    y = 1e4 + 1e-2 * torch.randn(shape)
    for got, want in zip(
        evaluate(ops.two_view_correlation, (x, y)),
        evaluate(OPS["two_view_correlation"].written_out, (x.double(), y.double())),
    ):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_far_mean_of_many_rows() -> None:
    """A sum of 1e6 rows in float32 would have lost three digits."""
    x = 100 + torch.randn(1_000_000, 2)
    z = ops.standardize(x)
    exact = batch_norm(x.double())
    assert (z.double() - exact).abs().max() <= 4e-6


def test_the_first_rows_mislead() -> None:
    """Statistics start from a guess by the first rows, which here are nowhere near the others."""
    x = torch.randn(400, 33)
    x[:16] += 1e5
    z, exact = ops.standardize(x), batch_norm(x.double())
    assert (z.double() - exact).norm() <= 4e-7 * exact.norm()
    x = 1e5 + torch.randn(400, 33)
    x[:16] -= 1e5
    z, exact = ops.standardize(x), batch_norm(x.double())
    assert (z.double() - exact).norm() <= 4e-7 * exact.norm()


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
def test_views_that_nearly_agree(distance: float) -> None:
    """The invariance term alone: differences are of the views as they came."""
    x = torch.randn(40, 100)
    y = x + distance * torch.randn(40, 100)

    def invariance(x: Tensor, y: Tensor) -> Tensor:
        return ops.two_view_covariance(x, y, variance=0.0, covariance=0.0)

    for got, want in zip(
        evaluate(invariance, (x, y)), evaluate(lambda x, y: 25 * F.mse_loss(x, y), (x.double(), y.double()))
    ):
        assert (got.double() - want).norm() <= 4e-7 * want.norm()


@pytest.mark.parametrize("n", [100, 300])
def test_small_losses(n: int) -> None:
    """Views that agree: the loss of the diagonal vanishes, the gradient does not blow up."""
    x = views(n, 200)[0]
    check_contract("two_view_correlation", (x, x + 1e-3 * torch.randn(n, 200)), floor=1e-6)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(33, 83), (83, 33)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_each_instruction_set(name: str, shape: tuple[int, int], dtype: torch.dtype, level: int) -> None:
    check(name, views(*shape, OPS[name].views, dtype=dtype))
