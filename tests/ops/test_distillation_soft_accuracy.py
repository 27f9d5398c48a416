# SPDX-License-Identifier: Apache-2.0
"""soft_cross_entropy where float32 is hard: sure students, huge and infinite logits, float16 gradients."""

from __future__ import annotations

import distillation_cases as cases
import pytest
import torch
from distillation_cases import Case, check, random_case
from torch import Tensor

from sslkernels import ops
from sslkernels.reference import distillation as reference

F32, F64 = torch.float32, torch.float64


def sure_rows(shape: tuple[int, ...], loss: float, tau: float, peak: int) -> Tensor:
    """Logits whose softmax leaves about `loss` to all prototypes but `peak`."""
    x = 0.3 * torch.randn(shape)
    x[..., peak] = torch.tensor(shape[-1] / loss).log() if loss < 1 else 2.0
    return tau * x


def public_reference(case: Case, **options: object) -> Tensor:
    student, teacher = (xs[0] for xs in case[:2])
    return reference.soft_cross_entropy(student, teacher, case.center, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [cases.ours, public_reference], ids=["op", "reference"])
@pytest.mark.parametrize("peak", [0, 2047, 2048, 5000])
@pytest.mark.parametrize("loss", [1.0, 1e-3, 1e-6])
def test_a_sure_student_keeps_its_digits(loss: float, peak: int, function: object) -> None:
    """lse - <p, x> would leave one digit of a loss of 1e-6, and softmax - p at the peak none of its gradient."""
    width = 5001
    student = sure_rows((4, 3, width), loss, 0.1, peak)
    teacher = sure_rows((2, 3, width), loss / 3 if loss < 1 else 1.0, 0.04, peak)
    case = Case([student], [teacher], None)
    exact, (exact_grad,) = cases.evaluate(cases.written_out, case.to(F64))
    value, (grad,) = cases.evaluate(function, case)
    assert loss < exact < 10 * loss
    assert abs(value / exact - 1) <= 1e-5
    assert (grad - exact_grad).norm() <= 1e-5 * exact_grad.norm()


def test_a_student_that_is_sure_of_something_else() -> None:
    student, teacher = sure_rows((4, 3, 3001), 1e-6, 0.1, 7), sure_rows((2, 3, 3001), 1e-6, 0.04, 2900)
    check(Case([student], [teacher]))
    check(Case([student], [teacher[:, :, :1].expand(-1, -1, 3001)]))


def test_a_row_that_rises_all_the_way() -> None:
    """Every chunk has a larger maximum than those before it, and the exponentials of the first ones vanish."""
    width = 9001
    rising = torch.linspace(-20, 20, width).expand(3, 2, width) + 0.01 * torch.randn(3, 2, width)
    for student in (rising, rising.flip(-1)):
        for size in (0.01, 0.1, 1.0):
            check(Case([size * student], [size * rising[:2]]))


@pytest.mark.parametrize("width", [2, 100, 5000])
def test_two_largest_logits(width: int) -> None:
    student, teacher = torch.zeros(3, 2, width), torch.zeros(2, 2, width)
    student[..., [0, -1]] = 2.0
    teacher[..., [0, -1]] = 1.0
    check(Case([student], [teacher]))


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
def test_huge_logits_at_a_low_temperature(dtype: torch.dtype) -> None:
    case = random_case(4, 2, 3, 2500, dtypes=(dtype, dtype), size=3e3)
    check(case, student_temp=0.001, teacher_temp=0.001)
    check(random_case(4, 2, 3, 2500, dtypes=(dtype, dtype), size=3e3), student_temp=0.1)
    check(random_case(4, 2, 3, 2500, dtypes=(dtype, dtype), size=1e-3))


def test_sixteen_bit_logits_are_read_exactly() -> None:
    """Denormals of float16 among them."""
    for dtype in (torch.float16, torch.bfloat16):
        case = random_case(None, 1, 3, 2200, dtypes=(dtype, dtype), size=3e-5, center="none")
        options = {"student_temp": 1e-5, "teacher_temp": 1e-5, "reduction": "none"}
        got, want = cases.ours(case, **options), cases.ours(case.to(F32), **options)
        assert torch.equal(got, want)
        check(case, torch.ones(3), **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_float16_gradients_wait_for_a_gradient_scaler(inplace: bool, weighted: bool) -> None:
    """One of 65,536 prototypes, in a mean over 144 rows: zero or a denormal in float16; times 2^16 it is neither."""
    case = random_case(10, 2, 8, 65536, dtypes=(torch.float16, torch.float16), weighted=weighted, size=0.1)
    options = {"student_temp": 1.0, "teacher_temp": 1.0}
    scale = 2.0**16
    leaf = case.student[0].clone().requires_grad_()
    loss = cases.ours(case._replace(student=[leaf * 1.0]), inplace=inplace, **options)
    (loss * scale).backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float16
    _, (exact,) = cases.evaluate(cases.written_out, case.to(F32), **options)

    def error(scaled: Tensor) -> float:
        return ((scaled.float() / scale - exact).norm() / exact.norm()).item()

    assert error(exact.half() * scale) > 0.1
    assert error(leaf.grad) <= 2 * error((exact * scale).half()) + torch.finfo(torch.float16).eps


# what is not finite


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("function", [cases.ours, public_reference], ids=["op", "reference"])
@pytest.mark.parametrize("where", [0, 2100, "all", "first chunk"])
@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("spoilt", ["student", "teacher", "both"])
def test_what_is_not_finite_is_as_in_eager(spoilt: str, bad: float, where: object, function: object) -> None:
    """inf - inf, 0 * inf and NaN where the written-out loop has them, in the rows that it is in; so is the gradient."""
    case = random_case(3, 2, 2, 4200, size=0.1)
    place = {"all": slice(None), "first chunk": slice(0, 2048)}.get(where, where)  # type: ignore[call-overload]
    if spoilt in ("student", "both"):
        case.student[0][1, 0, place] = bad
    if spoilt in ("teacher", "both"):
        case.teacher[0][0, 0, place] = bad
    options = {"reduction": "none", "teacher_temp": 0.1}
    cotangent = torch.rand(3, 2) + 0.5
    got, want = (cases.evaluate(f, case, cotangent, **options) for f in (function, cases.written_out))
    same(got[0], want[0])
    assert got[0][:, 1].isfinite().all()
    same(got[1][0], want[1][0])
    total, (grad,) = cases.evaluate(function, case, teacher_temp=0.1)
    assert torch.equal(total.isfinite(), want[0].isfinite().all())
    assert torch.equal(grad.isnan(), want[1][0].isnan())


def test_the_mean_shows_what_is_not_finite() -> None:
    x = torch.randn(2, 3, 70)
    x[1, 1, 5] = torch.nan
    p, mean = ops.softmax_center(x)
    assert p[1, 1].isnan().all() and p.isnan().sum() == 70
    assert mean[5].isnan() and mean.isnan().sum() == 1
    x[1, 1, 5] = -torch.inf
    p, mean = ops.softmax_center(x)
    assert p.isfinite().all() and p[1, 1, 5] == 0 and mean[5] == -torch.inf
