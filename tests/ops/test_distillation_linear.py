# SPDX-License-Identifier: Apache-2.0
"""linear_soft_cross_entropy against DINO's loop over pairs, written out in float64, in both forms of the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import distillation_linear_cases as cases
import pytest
import torch
import torch.nn.functional as F
from distillation_linear_cases import agreeing_case, check, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import _distillation_linear as module

# one prototype, a vector of 16 and its neighbours, strips of 512 for each of two threads, and the panels' of 1,024
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 130, 511, 513, 1023, 1025, 2051)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# with no panel for free, few samples of many views go by tiles, very many of one view by panels
TILES, PANELS = (4, 2, 9), (1, 1, 1100)


@pytest.fixture(params=["whole", "cut"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All logits in one panel, or cut by the rule for large ones: into panels, or tiles."""
    if request.param == "cut":
        monkeypatch.setattr(module, "PANEL_BYTES", 0)
    yield request.param


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_option(data: st.DataObject, panels: str) -> None:
    draw = data.draw
    students, teachers = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    case = random_case(
        students, teachers, draw(st.integers(1, 12)), draw(st.sampled_from(WIDTHS)), draw(st.integers(2, 9))
    )
    if draw(st.booleans()):
        case = case._replace(teacher_weight=None)
    if draw(st.booleans()):
        case = case._replace(center=None if case.center is None else case.center[0], row_weight=None)
    check(
        case,
        frozen=draw(st.booleans()),
        student_temp=draw(st.sampled_from([0.1, 1.0])),
        teacher_temp=draw(st.sampled_from([0.04, 0.3])),
        exclude_same_view=draw(st.booleans()) and max(students, teachers) > 1,
        reduction=draw(st.sampled_from(["mean", "sum"])),
    )


def test_one_feature(panels: str) -> None:
    """Unit rows of one feature are 1 or -1: BLAS adds equal numbers, whose roundings do not average out."""
    case = random_case(4, 2, 5, 1025, 1)
    results, exact = cases.evaluate(cases.ours, case), cases.evaluate(cases.written_out, case.to(torch.float64))
    for x, e in zip(results, exact):
        assert (x - e).norm() <= 2e-5 * e.norm()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, frozen: bool, panels: str) -> None:
    check(random_case(*TILES, 301, 24, dtype), frozen)


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.float16], ids=str)
def test_mixed_dtypes(other: torch.dtype, panels: str) -> None:
    case = random_case(*TILES, 301, 24, torch.bfloat16)
    check(case._replace(weight=case.weight.to(other)))
    check(case._replace(student=case.student.to(other), center=torch.randn(1, 301)))
    check(case._replace(teacher=case.teacher.to(other)))


def test_strides(panels: str) -> None:
    case = random_case(4, 2, 6, 130, 10)
    wide = torch.randn(130, 21)
    check(case._replace(weight=wide[:, ::2][:, :10]))
    check(case._replace(weight=wide.T.contiguous().T[:, :10], teacher_weight=wide[:, 11:]))
    check(case._replace(student=torch.randn(10, 6, 4).permute(2, 1, 0), teacher=torch.randn(6, 2, 10).transpose(0, 1)))
    check(case._replace(teacher=torch.randn(1, 1, 10).expand(2, 6, 10)))


def test_rows_without_views(panels: str) -> None:
    """(N, D): row i meets row i, as in iBOT's patch loss."""
    case = random_case(1, 1, 40, 300, 12)._replace(center=None)
    student, teacher = case.student[0].clone().requires_grad_(), case.teacher[0]
    got = ops.linear_soft_cross_entropy(student, case.weight, teacher, case.teacher_weight, row_weight=case.row_weight)
    (grad,) = torch.autograd.grad(got, student)
    loss, _, dstudent, _ = cases.evaluate(cases.written_out, case.to(torch.float64), exclude_same_view=False)
    assert abs(got - loss) <= 1e-6 * loss and (grad - dstudent[0]).norm() <= 1e-5 * dstudent.norm()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_many_samples(frozen: bool, panels: str) -> None:
    """Panels, and sweeps, of a part of the samples: the gradient of the prototypes is a sum over them."""
    check(random_case(*PANELS, 67, 5), frozen, exclude_same_view=False)
    check(random_case(9, 2, 131, 67, 5), frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("norm", [0.9, 1.6, 2.4])
def test_agreement_keeps_its_digits(norm: float, frozen: bool, panels: str) -> None:
    """Losses near 1, 1e-3 and 1e-6, where the probability of the favourite rounds to one."""
    case = agreeing_case(5, 2, 6, 2003, 64, norm)
    check(case, frozen)
    loss, _, dstudent, dweight = cases.evaluate(cases.ours, case, frozen)
    exact, _, exact_dstudent, exact_dweight = cases.evaluate(cases.written_out, case.to(torch.float64), frozen)
    largest = 10 * F.linear(case.student, case.weight).abs().max()
    bound = max(1e-5, 4 * torch.finfo(torch.float32).eps * float(largest))
    assert abs(loss - exact) <= bound * exact
    for x, e in ((dstudent, exact_dstudent), (dweight, exact_dweight)):
        assert (x - e).norm() <= bound * e.norm(), (exact, (x - e).norm() / e.norm())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_teachers_that_disagree(frozen: bool, panels: str) -> None:
    """Each teacher is sure of another prototype: the favourite that is kept out of the sums is not that of each."""
    case = agreeing_case(4, 3, 7, 501, 32, 2.0)
    other = agreeing_case(1, 3, 7, 501, 32, 1.0)
    check(case._replace(teacher=torch.cat([case.teacher[:1], other.teacher[1:]])), frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("temperature", [0.001, 1.0])
def test_huge_logits_stay_finite(temperature: float, frozen: bool, panels: str) -> None:
    case = random_case(*TILES, 301, 24)
    case = case._replace(student=100 * case.student, weight=100 * case.weight, teacher=1e4 * case.teacher)
    options = {"student_temp": temperature, "teacher_temp": temperature}
    results = cases.evaluate(cases.ours, case, frozen, **options)
    assert all(x.isfinite().all() for x in results)
    check(case, frozen, **options)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(bad: float, frozen: bool, panels: str) -> None:
    case = random_case(*TILES, 301, 24)
    assert case.row_weight is not None
    for i, name in enumerate(("student", "teacher")):
        x = case[2 * i].clone()
        x[1, 0, 3] = bad
        loss, mean, dstudent, _ = cases.evaluate(cases.ours, case._replace(**{name: x}), frozen)
        assert loss.isnan() and mean.isfinite().all() != (name == "teacher")
        assert dstudent[:, 0].isnan().any() and dstudent[:, 1:].isfinite().all()
    unread = case.student.clone()
    unread[:, case.row_weight == 0] = bad
    for x, y in zip(*(cases.evaluate(cases.ours, case._replace(student=s), frozen) for s in (unread, case.student))):
        assert torch.equal(x, y)  # a sample of weight zero is not read
    weight = case.weight.clone()
    weight[5, 5] = bad
    loss, _, dstudent, _ = cases.evaluate(cases.ours, case._replace(weight=weight), frozen)
    assert loss.isnan() and dstudent[:, 0].isnan().any()


def test_no_samples() -> None:
    case = random_case(3, 2, 0, 17, 5)
    for reduction, value in (("sum", 0.0), ("mean", float("nan"))):
        loss, mean, dstudent, dweight = cases.evaluate(cases.ours, case, reduction=reduction)
        assert torch.equal(loss.nan_to_num(-1.0), torch.tensor(value).nan_to_num(-1.0)) and mean.isnan().all()
        assert dstudent.shape == (3, 0, 5) and not dweight.any()


def test_views_in_a_list_count_in_order(panels: str) -> None:
    case = random_case(5, 2, 4, 130, 6)
    s, t = case.student, case.teacher
    leaves = [x.clone().requires_grad_() for x in (s[0], s[1:4], s[4])]
    loss = ops.linear_soft_cross_entropy(leaves, case.weight, (t[0], t[1]), case.teacher_weight, case.center)
    grads = torch.autograd.grad(loss, leaves)
    want, _, dstudent, _ = cases.evaluate(cases.ours, case._replace(row_weight=None), frozen=True)
    assert torch.equal(loss.detach(), want)
    assert torch.equal(torch.cat([x.reshape(-1, 4, 6) for x in grads]), dstudent)


def test_no_gradient_comes_through_the_teacher(panels: str) -> None:
    """weight serves both sides; its gradient is that of the student's."""
    case = random_case(*TILES, 130, 6)._replace(teacher_weight=None)
    teacher, center = case.teacher.clone().requires_grad_(), case.center
    weight = case.weight.clone().requires_grad_()
    loss = ops.linear_soft_cross_entropy(case.student, weight, teacher, None, center, row_weight=case.row_weight)
    loss.backward()
    assert teacher.grad is None and weight.grad is not None
    separate = case._replace(teacher_weight=case.weight.clone())
    assert torch.equal(weight.grad, cases.evaluate(cases.ours, separate)[3])


def test_normalised_prototypes() -> None:
    """The head of DINOv2: F.normalize as a parametrization, its gradient composed by autograd."""
    case = random_case(*TILES, 130, 6)

    class Unit(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1)

    layers = [torch.nn.Linear(6, 130, bias=False).double() for _ in range(2)]
    for layer in layers:
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Unit())
    layers[1].load_state_dict(layers[0].state_dict())
    case = case.to(torch.float64)
    for function, layer in zip((cases.ours, cases.written_out), layers):
        function(case._replace(weight=layer.weight))[0].backward()
    mine, exact = (layer.parametrizations.weight.original.grad for layer in layers)
    torch.testing.assert_close(mine, exact)


def test_the_mean_of_the_logits_is_not_rounded_by_large_rows() -> None:
    case = random_case(2, 2, 500, 33, 8)
    case = case._replace(teacher=case.teacher + 1e4)
    _, mean = cases.ours(case)
    _, exact = cases.written_out(case.to(torch.float64))
    assert (mean - exact).norm() <= 2 * torch.finfo(torch.float32).eps * exact.norm()
