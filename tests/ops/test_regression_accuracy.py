# SPDX-License-Identifier: Apache-2.0
"""masked_regression where float32 is hard: near its target, far from zero, very long and very short rows."""

from __future__ import annotations

import pytest
import regression_cases as cases
import torch
from regression_cases import COSINES, Case, check
from torch import Tensor

F32, F64 = torch.float32, torch.float64


def relative(case: Case, **options: object) -> tuple[float, float, float]:
    """Relative errors of the value and of the gradient, and eager's of the gradient."""
    exact, exact_grad = cases.evaluate(cases.written_out, case.to(F64), **options)
    value, grad = cases.evaluate(cases.ours, case, **options)
    eager_grad = cases.evaluate(cases.written_out, case, **options)[1]
    errors = ((g.double() - exact_grad).norm() / exact_grad.norm() for g in (grad, eager_grad))
    return abs(value.item() / exact.item() - 1), *(e.item() for e in errors)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_a_small_loss_does_not_cancel(loss: str, size: float) -> None:
    """1 - cos and its gradient come from the difference: 1 minus a cosine would keep one digit of 1e-6."""
    target = torch.randn(40, 256)
    if loss in COSINES:
        pred = 3 * (target + (2 * size) ** 0.5 * torch.randn(40, 256))
    else:
        # a power of two away from zero, so that pred - target is not rounded before it comes here
        pred = target + torch.randn(40, 256).sign() * 2.0 ** round(torch.tensor(size).log2().item() / 2)
    value, grad, eager_grad = relative(Case(pred, target), loss=loss)
    assert value <= 1e-6
    fused = torch.ops.sslkernels.cpu_level() > 0
    assert grad <= (1e-6 if fused else 2 * eager_grad + 1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4, -1e6])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e4])
def test_a_target_far_from_zero_is_normalised_exactly(offset: float, spread: float) -> None:
    """Its values are what float32 holds; deviations from their mean are exact, whatever the mean."""
    case = Case(torch.randn(6, 384), offset + spread * torch.randn(6, 384))
    for loss in ("smooth_l1", "l2"):
        value, grad, _ = relative(case, loss=loss, normalize_target=True)
        assert value <= 2e-6 and grad <= 2e-6


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -3e4, 1e30])
@pytest.mark.parametrize("width", [2, 17, 384])
def test_a_constant_target_row_is_normalised_to_zero(constant: float, width: int) -> None:
    pred = torch.randn(5, width)
    target = torch.full((5, width), constant)
    got = cases.ours(Case(pred, target), loss="l2", normalize_target=True, reduction="none")
    torch.testing.assert_close(got, pred.square().mean(-1))


@pytest.mark.parametrize("length", [1e-30, 1e-18, 1e-4, 1e4, 1e18, 1e30])
@pytest.mark.parametrize("loss", COSINES)
def test_directions_of_rows_of_any_length(loss: str, length: float) -> None:
    """Squares that float32 does not hold; eps is set below every length, so that the lengths are exact."""
    for dtype in (F32, F64):
        directions = torch.nn.functional.normalize(torch.randn(2, 6, 100, dtype=F64), dim=-1)
        for p, t in ((length, length), (length, 1.0), (1.0, length)):
            case = Case((p * directions[0]).to(dtype), (t * directions[1]).to(dtype))
            exact, exact_grad = cases.evaluate(cases.written_out, case.to(F64), loss=loss, eps=1e-35)
            value, grad = cases.evaluate(cases.ours, case, loss=loss, eps=1e-35)
            tolerance = 40 * torch.finfo(dtype).eps
            torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=0.0)
            if 1e-37 < exact_grad.abs().max() < 1e37:
                assert (grad.double() - exact_grad).norm() <= tolerance * exact_grad.norm()


@pytest.mark.parametrize("norm", [0.0, 1e-9, 5e-7])
@pytest.mark.parametrize("short", ["pred", "target", "both"])
@pytest.mark.parametrize("loss", COSINES)
def test_rows_shorter_than_eps(loss: str, short: str, norm: float) -> None:
    """The divisor is eps then, as in BYOL (1e-12 on the square) and torch's cosine_similarity."""
    eps = 1e-6
    rows = torch.nn.functional.normalize(torch.randn(2, 7, 33, dtype=F64), dim=-1)
    pred, target = (x * (norm if short in (name, "both") else 2.0) for x, name in zip(rows, ("pred", "target")))

    def by_hand(case: Case, **options: object) -> Tensor:
        u, v = (x / x.norm(dim=-1, keepdim=True).clamp_min(eps) for x in case[:2])
        return (1 - (u * v).sum(-1)).mean() if loss == "cosine" else (u - v).square().sum(-1).mean()

    case = Case(pred, target)
    exact, exact_grad = cases.evaluate(by_hand, case)
    value, grad = cases.evaluate(cases.ours, case, loss=loss, eps=eps)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-9 * float(exact_grad.abs().max()) + 1e-15)
    torch.testing.assert_close(cases.ours(case.to(F32), loss=loss, eps=eps).double(), exact, rtol=1e-6, atol=1e-7)
    if loss == "cosine":
        torch.testing.assert_close(cases.written_out(case, loss=loss, eps=eps), exact, rtol=1e-12, atol=1e-14)


def test_byol_and_simsiam_agree() -> None:
    """|u - v|^2 = 2 - 2 cos, so BYOL's loss is 4 + 4 times SimSiam's."""
    rows = torch.randn(4, 20, 64, dtype=F64)
    p1, p2, z1, z2 = rows
    byol = sum(cases.ours(Case(p, z), loss="normalized_l2") for p, z in ((p1, z2), (p2, z1)))
    simsiam = sum(cases.ours(Case(p, z), loss="cosine") - 1 for p, z in ((p1, z2), (p2, z1))) / 2
    torch.testing.assert_close(byol, 4 + 4 * simsiam)


@pytest.mark.parametrize("norm", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", cases.LOSSES)
def test_large_and_small_features(loss: str, dtype: torch.dtype, norm: float) -> None:
    case = cases.random_case((5, 7), 9, 128)
    scaled = case._replace(pred=(norm / 11 * case.pred).to(dtype), target=(norm / 11 * case.target).to(dtype))
    check(scaled, loss=loss)
    if loss not in COSINES:
        check(scaled._replace(pred=case.pred.to(dtype)), loss=loss, normalize_target=True)


@pytest.mark.parametrize("beta", [1e-40, 1e-30, 1e-6, 1e6, 1e25])
def test_any_beta(beta: float) -> None:
    case = cases.random_case((3, 4), 5, 50)
    value, grad, _ = relative(case, loss="smooth_l1", beta=beta)
    assert grad <= 1e-6
    assert value <= 1e-6
