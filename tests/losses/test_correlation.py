# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins, VICReg, TiCo and FroSSL: their published formulas, values by hand, what they do not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import correlation_formulas as formula
import pytest
import torch
import torch.nn.functional as F
from loss_formulas import bound
from torch import Tensor

from sslkernels import losses

F64 = torch.float64
Loss = Callable[[Tensor, Tensor], Tensor]
C = torch.randn(40, 40, generator=torch.Generator().manual_seed(7), dtype=F64)
C = C @ C.T / 1600  # of an earlier batch: symmetric, of trace about one


def tico_pair(function: Callable[..., tuple[Tensor, Tensor]], **options: bool) -> Loss:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        c = C[: a.shape[1], : a.shape[1]]
        return function(a, b, c if a.dtype == F64 else c.float(), **options)[0]

    return loss


# ours, theirs
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "barlow_twins": (losses.barlow_twins_loss, formula.barlow_twins),
    "vicreg": (losses.vicreg_loss, formula.vicreg),
    "vicreg paper": (
        lambda a, b: losses.vicreg_loss(a, b, variant="paper"),
        lambda a, b: formula.vicreg(a, b, halves=1),
    ),
    "tico": (tico_pair(losses.tico_loss), tico_pair(formula.tico)),
    "tico through": (tico_pair(losses.tico_loss, through_batch=True), tico_pair(formula.tico, through_batch=True)),
    "frossl": (lambda a, b: losses.frossl_loss([a, b]), lambda a, b: formula.frossl([a, b])),
    "frossl of 3": (
        lambda a, b: losses.frossl_loss([a, b, a - 2 * b], 0.5),
        lambda a, b: formula.frossl([a, b, a - 2 * b], 0.5),
    ),
}
# wide, high, square; D / 2 and one more, where the space changes; 3 rows are the least with a stable gradient
SHAPES = [(3, 5), (7, 33), (16, 32), (17, 32), (64, 9), (40, 40)]


def pair(n: int, d: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    a = torch.randn(n, d)
    b = a + 0.3 * torch.randn(n, d)
    return (0.7 * a + 0.5).to(dtype).requires_grad_(), (0.7 * b).to(dtype).requires_grad_()


def run(loss: Loss, a: Tensor, b: Tensor) -> list[Tensor]:
    value = loss(a, b)
    return [value.detach(), *torch.autograd.grad(value, (a, b))]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_published_formula(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Value and gradients: within the library's promise, or twice the error of eager where that is larger."""
    ours, theirs = LOSSES[name]
    a, b = pair(*shape, dtype)
    truth = run(theirs, *(x.detach().double().requires_grad_() for x in (a, b)))
    eager = errors(run(theirs, a, b), truth)
    for error, allowed in zip(errors(run(ours, a, b), truth), eager, strict=True):
        assert error <= max(bound(dtype, 1), 2 * allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_16_bits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The value has float32's precision; gradients are rounded, once where the loss adds none up itself."""
    ours, theirs = LOSSES[name]
    a, b = pair(24, 40, dtype)
    value, *gradients = run(ours, a, b)
    truth = run(theirs, *(x.detach().double().requires_grad_() for x in (a, b)))
    if name == "frossl of 3":  # its third view is rounded to 16 bits before the loss
        truth[0] = formula.frossl([x.detach().double() for x in (a, b, a - 2 * b)], 0.5)
    assert value.dtype == torch.float32 and all(g.dtype == dtype for g in gradients)
    found = errors([value, *gradients], truth)
    assert found[0] <= bound(torch.float32, 1)
    assert max(found[1:]) <= 2 * torch.finfo(dtype).eps


def test_mixed_dtypes() -> None:
    a, b = pair(12, 20, torch.float32)
    half = b.detach().bfloat16().requires_grad_()
    for name, (ours, theirs) in LOSSES.items():
        if name == "frossl of 3":
            continue  # its third view mixes them
        found = run(ours, a, half)
        truth = run(theirs, a.detach().double().requires_grad_(), half.detach().double().requires_grad_())
        assert found[0].dtype == torch.float32 and found[2].dtype == torch.bfloat16
        assert max(errors(found[:2], truth[:2])) <= bound(torch.float32, 1)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "frossl"])
def test_two_rows(name: str) -> None:
    """The least batch. Barlow Twins standardises every column to +-1: no gradient but what eps leaves."""
    ours, theirs = LOSSES[name]
    a, b = pair(2, 6)
    for x, y in zip(run(ours, a, b), run(theirs, a, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24)], ids=str)
def test_a_mean_a_million_deviations_away(name: str, shape: tuple[int, int]) -> None:
    """Columns of mean 1e4 and deviation 1e-2, where float32 has 1e-3 between neighbours; the truth has them as well."""
    ours, theirs = LOSSES[name]
    a = (1e4 + 1e-2 * torch.randn(*shape)).requires_grad_()
    b = (a.detach() + 1e-2 * torch.randn(*shape)).requires_grad_()
    truth = run(theirs, *(x.detach().double().requires_grad_() for x in (a, b)))
    assert max(errors(run(ours, a, b), truth)) <= bound(torch.float32, 1)


# four rows, two columns of mean 0 and variance 1 that are not correlated
SQUARE = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64)
SWAPPED = SQUARE.flip(1)


def near(value: Tensor, expected: float) -> None:
    assert float(value) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_barlow_twins_by_hand() -> None:
    one = 1 / (1 + 1e-5)  # the eps of batch norm
    near(losses.barlow_twins_loss(SQUARE, SQUARE), 2 * (1 - one) ** 2)
    near(losses.barlow_twins_loss(SQUARE, -SQUARE), 2 * (1 + one) ** 2)
    near(losses.barlow_twins_loss(SQUARE, SWAPPED, 0.25), 2 + 0.25 * 2 * one**2)  # c is 0 on its diagonal, 1 beside it
    near(losses.barlow_twins_loss(SQUARE, torch.ones_like(SQUARE)), 2)  # a constant column: c is 0


def test_vicreg_by_hand() -> None:
    near(losses.vicreg_loss(SQUARE, SQUARE), 0)  # unbiased variance 4 / 3
    std = math.sqrt(1 / 3 + 1e-4)
    near(losses.vicreg_loss(SQUARE / 2, SQUARE / 2), 25 * (1 - std))
    near(losses.vicreg_loss(SQUARE / 2, SQUARE / 2, variant="paper"), 50 * (1 - std))
    near(losses.vicreg_loss(SQUARE / 2, SQUARE / 2, 1.0, 4.0, eps=0.25), 4 * (1 - math.sqrt(1 / 3 + 0.25)))
    near(losses.vicreg_loss(SQUARE, SWAPPED, 3.0), 3 * 2)  # half of the rows, each 2 away in both features
    same = SQUARE[:, :1].expand(-1, 2)
    near(losses.vicreg_loss(same, same, 1.0, 1.0, 9.0), 9 * 2 * (2 * (4 / 3) ** 2 / 2))


def test_tico_by_hand() -> None:
    """Rows e_0, e_1: B = I / 2, and C = 0.1 B, then 0.9 * 0.1 B + 0.1 B."""
    eye = torch.eye(2, dtype=F64)
    loss, covariance = losses.tico_loss(3 * eye, eye)
    near(loss, 8 * 0.05)
    torch.testing.assert_close(covariance, 0.05 * eye)
    loss, covariance = losses.tico_loss(eye, -eye, covariance, rho=2.0)
    near(loss, 2 + 2 * 0.095)
    torch.testing.assert_close(covariance, 0.095 * eye)
    loss, covariance = losses.tico_loss(eye, eye.flip(0), covariance, beta=0.0, rho=0.0)
    near(loss, 1)
    torch.testing.assert_close(covariance, 0.5 * eye)


def test_frossl_by_hand() -> None:
    near(losses.frossl_loss([SQUARE, SQUARE]), 2 * (math.log(2) - 2 * math.log(2)))  # orthonormal columns
    same = SQUARE[:, :1].expand(-1, 2)
    near(losses.frossl_loss([same, same, same]), 0)  # one direction
    near(losses.frossl_loss([SQUARE, -SQUARE], 3.0), -2 * math.log(2) + 3 * 2 / 4 * 2 * 2)  # mean 0, |u|^2 = 2
    padded = torch.cat([SQUARE, torch.zeros_like(SQUARE)], dim=1)  # columns of zeros are in no trace
    near(losses.frossl_loss([padded, padded]), -2 * math.log(2))


def test_vicreg_of_positions_is_lightlys() -> None:
    """(B, H, W, D): their covariance is of each position, variance and invariance of all."""
    a, b = (torch.randn(6, 2, 3, 5, dtype=F64, requires_grad=True) for _ in range(2))
    expected = 25 * F.mse_loss(a, b)
    for z in (a, b):
        expected = expected + 12.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        z = z - z.mean(0)
        cov = torch.einsum("b...c,b...d->...cd", z, z) / 5
        expected = expected + (cov[..., ~torch.eye(5, dtype=torch.bool)].square().sum(-1) / 5).mean()
    value = losses.vicreg_loss(a, b)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)))
    torch.testing.assert_close(losses.vicreg_loss(a[:, 0, :1], b[:, 0, :1]), losses.vicreg_loss(a[:, 0, 0], b[:, 0, 0]))


def test_tico_gradient_of_the_covariance_term() -> None:
    """2 rho C u / N with B a constant, with B's own part 2 rho (1 - beta) B u / N more without; one value."""
    a, b = pair(9, 40)
    u = F.normalize(a.detach(), dim=1)
    batch = u.T @ u / 9
    c = 0.9 * C + 0.1 * batch
    for through in (False, True):
        value = losses.tico_loss(a, b.detach(), C, through_batch=through)[0]
        gradient = 2 * 8 / 9 * u @ (c + 0.1 * batch if through else c) - F.normalize(b.detach(), dim=1) / 9
        lengths = a.detach().norm(dim=1, keepdim=True)
        expected = (gradient - u * (u * gradient).sum(1, keepdim=True)) / lengths
        torch.testing.assert_close(torch.autograd.grad(value, a)[0], expected)
        torch.testing.assert_close(value, formula.tico(a, b, C)[0])


def test_frossl_gradient_is_the_same_with_a_constant_trace() -> None:
    """lightly's trace is a Python number. Columns of unit length have a trace that does not move."""
    a, b = pair(9, 6)
    with_constant = run(lambda a, b: formula.frossl([a, b]), a, b)
    torch.testing.assert_close(with_constant, run(lambda a, b: formula.frossl([a, b], constant_trace=False), a, b))


ROWS, COLUMNS = torch.randperm(24), torch.randperm(40)
SCALE = 10.0 ** torch.linspace(0, 2, 40, dtype=F64)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_rows_does_not_matter(name: str) -> None:
    loss, (a, b) = LOSSES[name][0], pair(24, 40)
    torch.testing.assert_close(loss(a[ROWS], b[ROWS]), loss(a, b))
    assert not torch.allclose(loss(a[ROWS], b), loss(a, b), rtol=1e-2)  # but rows belong together


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "frossl"])
def test_order_of_features_and_of_views_does_not_matter(name: str) -> None:
    loss, (a, b) = LOSSES[name][0], pair(24, 40)
    torch.testing.assert_close(loss(a[:, COLUMNS], b[:, COLUMNS]), loss(a, b))
    torch.testing.assert_close(loss(b, a), loss(a, b))
    assert not torch.allclose(loss(a[:, COLUMNS], b), loss(a, b), rtol=1e-2)


def test_barlow_twins_ignores_an_affine_map_of_each_feature() -> None:
    """Of each view on its own where the scale is positive; a change of sign must be in both."""
    a, b = pair(24, 40)
    expected = losses.barlow_twins_loss(a, b)
    # batch norm's eps is not scaled along: 1e-5 of a variance of 0.5
    torch.testing.assert_close(losses.barlow_twins_loss(a * SCALE + 3, b - SCALE), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(losses.barlow_twins_loss(-a, -b), expected)
    assert losses.barlow_twins_loss(-a, b) > 10 * expected


def test_vicreg_ignores_a_common_shift() -> None:
    a, b = pair(24, 40)
    torch.testing.assert_close(losses.vicreg_loss(a + SCALE, b + SCALE), losses.vicreg_loss(a, b))
    apart = losses.vicreg_loss(a, b + 2) - losses.vicreg_loss(a, b)
    torch.testing.assert_close(apart, 25 * ((a - b - 2).square().mean() - (a - b).square().mean()))


def test_tico_ignores_the_length_of_rows_and_a_rotation() -> None:
    a, b = pair(24, 40)
    expected, covariance = losses.tico_loss(a, b)
    length = torch.rand(24, 1, dtype=F64) + 0.5
    torch.testing.assert_close(losses.tico_loss(a * length, b / length)[0], expected)
    turn = torch.linalg.qr(torch.randn(40, 40, dtype=F64)).Q
    rotated, c = losses.tico_loss(a @ turn, b @ turn)
    torch.testing.assert_close(rotated, expected)
    torch.testing.assert_close(c, turn.T @ covariance @ turn)


def test_frossl_ignores_the_length_of_columns() -> None:
    a, b = pair(24, 40)
    torch.testing.assert_close(losses.frossl_loss([a * SCALE, b / SCALE]), losses.frossl_loss([a, b]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(name: str, bad: float) -> None:
    a, b = pair(24, 40, torch.float32)
    a.data[3, 5] = bad
    value, *gradients = run(LOSSES[name][0], a, b)
    assert value.isnan()
    assert gradients[0][:, 5].isnan().any()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str) -> None:
    a, b = pair(24, 40, torch.float32)
    expected = run(LOSSES[name][0], a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[name][0](a, b)
    found = [value, *torch.autograd.grad(value, (a, b))]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_strided_views(name: str) -> None:
    """A transposed tensor, every second row, a slice of a wider one: as their dense copies."""
    loss = LOSSES[name][0]
    wide = torch.randn(40, 48)
    for a, b in ((wide[:, :24].T, wide[:, 24:].T), (wide.T[::2], wide.T[1::2]), (wide.T[:, 8:], wide.T[:, :32])):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        dense = (x.detach().contiguous().requires_grad_() for x in (a, b))
        for x, y in zip(run(loss, a, b), run(loss, *dense), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_double_backward_is_refused(name: str) -> None:
    a, b = pair(12, 20)
    (gradient,) = torch.autograd.grad(LOSSES[name][0](a, b), a, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()
