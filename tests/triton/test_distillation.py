# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the self-distillation ops in the interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels import ops
from tests.triton.conftest import doubled, launcher

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
LINEAR_OPTIONS = (True, True, True, 0, [True, True])  # exclude, mean, return_center, panel_bytes, output_mask


def logits(views: int, batch: int, width: int, dtype: torch.dtype = F32) -> Tensor:
    return (0.5 * torch.randn(views, batch, width)).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values, prototypes first in memory and every other one."""
    wide = x.new_full((x.shape[-1], 2, *x.shape[:-1]), torch.nan)
    wide[:, 0] = x.movedim(-1, 0)
    return wide[:, 0].movedim(0, -1)


def operands(
    students: int, teachers: int, batch: int, width: int, dtype: torch.dtype = F32, teacher_dtype: torch.dtype = F32,
    *, center: int = 1, weighted: bool = False,
) -> list[Any]:  # fmt: skip
    """student, teacher, center, row_weight, temperatures."""
    weight = torch.rand(batch) if weighted else None
    if weight is not None and batch > 1:
        weight[1] = 0.0
    return [
        [logits(students, batch, width, dtype)], [logits(teachers, batch, width, teacher_dtype)],
        0.3 * torch.randn(center, width) if center else None, weight, 0.1, 0.04,
    ]  # fmt: skip


@pytest.fixture
def emitted(compare: Callable) -> Callable[..., None]:
    """As `compare`, of soft_cross_entropy with float16 students, whose gradients wait scaled."""

    def call(*arguments: Any) -> None:
        loss, mean, scale, *gradients = launcher("soft_cross_entropy")(*arguments)
        expected = torch.ops.sslkernels.soft_cross_entropy(*arguments)
        torch.testing.assert_close((loss, mean, scale), tuple(expected[:3]), rtol=1e-5, atol=1e-6)
        for x, y in zip(gradients, expected[3:], strict=True):
            assert x.dtype == F16 and x.isfinite().all()
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3 * float(y.abs().max()))

    return call


# one prototype, a tile of 16 and its neighbours, a prime
@pytest.mark.parametrize("width", [1, 15, 16, 17, 37])
def test_widths(compare: Callable, width: int) -> None:
    x = operands(2, 2, 2, width, weighted=True)
    compare("soft_cross_entropy", *x, True, True, [True, True])
    compare("softmax_center", strided(x[1][0])[0], x[2], 0.07)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(compare: Callable, emitted: Callable, dtype: torch.dtype) -> None:
    same, mixed = operands(2, 2, 3, 20, dtype, dtype), operands(2, 2, 3, 20, dtype, F32, weighted=True)
    for x in (same, mixed):
        options = (*x, True, True, [True, True])
        emitted(*options) if dtype == F16 else compare("soft_cross_entropy", *options)
    compare("soft_cross_entropy_rows", *mixed, True, True)
    compare("soft_cross_entropy_rows_backward", torch.randn(2, 3), *same, True, [True])
    compare("softmax_center", same[1][0][0], same[2], 0.07)


@pytest.mark.parametrize(
    ("students", "teachers", "exclude"), [(1, 1, False), (1, 2, True), (2, 1, True), (2, 2, False), (4, 3, True)]
)
def test_views(compare: Callable, students: int, teachers: int, exclude: bool) -> None:
    x = operands(students, teachers, 2, 19, center=teachers)
    for mean in (True, False):
        compare("soft_cross_entropy", *x, exclude, mean, [True, mean])
    compare("soft_cross_entropy_rows", *x, exclude, False)
    compare("soft_cross_entropy_rows_backward", torch.randn(2, students).T, *x, exclude, [True])


def test_lists_of_views(compare: Callable) -> None:
    """(B, V) and (S, B, V) count in order; what nobody wants is not made."""
    student, teacher = logits(4, 2, 19), logits(3, 2, 19)
    rest = None, torch.tensor([0.5, 2.0]), 0.1, 0.04, True
    parts = [student[0], strided(student[1:3]), student[3]], [teacher[0], strided(teacher[1:])]
    compare("soft_cross_entropy", *parts, *rest, True, [True, False, True, True])
    compare("soft_cross_entropy", *parts, *rest, False, [False, False, False, False])
    compare("soft_cross_entropy_rows", *parts, *rest, True)
    compare("soft_cross_entropy_rows_backward", torch.randn(1, 1).expand(4, 2), *parts, *rest, [False, True, True])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_in_place(dtype: torch.dtype) -> None:
    student, teacher = logits(3, 2, 35, dtype), logits(2, 2, 35, dtype)
    options = [teacher], None, None, 0.1, 0.04, True, True
    kept, written = strided(student[:2]), student[2].clone()
    loss, mean, scale, *gradients = launcher("soft_cross_entropy")(
        [student[:2], student[2]], *options, [True, True, False]
    )
    got = launcher("soft_cross_entropy_")([kept, written], *options, [True, True, False])
    assert all(map(torch.equal, got, (loss, mean, scale)))
    assert torch.equal(kept, gradients[0]) and torch.equal(written, gradients[1])
    launcher("soft_cross_entropy_")([kept, written], *options, [False, False, False])
    assert torch.equal(written, gradients[1])


@pytest.mark.parametrize("name", ["soft_cross_entropy", "linear_soft_cross_entropy"])
def test_agreement_keeps_its_digits(name: str) -> None:
    """Student and teachers are sure of the same prototypes: losses that 1 - p in float32 would round to nothing, and a
    gradient of the favourite that is minus the sum of the others."""
    width, steep = 21, 1.6 if name == "soft_cross_entropy" else 1.0
    sure = steep * torch.nn.functional.one_hot(torch.tensor([[3, 20]]), width).float() + 0.05 * torch.rand(1, 2, width)
    student, teacher = sure.repeat(3, 1, 1), sure.repeat(2, 1, 1)
    if name == "soft_cross_entropy":
        arguments: list[Any] = [[student], [teacher], None, None, 0.1, 0.09, True, True, [True, False]]
    else:
        eye = torch.eye(width)
        arguments = [1.6 * student, eye, 1.6 * teacher, eye, None, None, 0.1, 0.09, True, True, False, 0, [True, False]]
    at = 3 if name == "soft_cross_entropy" else 2
    got = launcher(name)(*arguments)
    exact = getattr(torch.ops.sslkernels, name)(*map(doubled, arguments))
    assert exact[0] < 1e-4
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=0.0)
    assert (got[at].double() - exact[at]).norm() <= 1e-5 * exact[at].norm()


def test_extremes(compare: Callable) -> None:
    """NaN and infinities stay in their rows; logits of any size; a sample of weight zero is not read."""
    x = operands(2, 2, 6, 19, weighted=False)
    student, teacher = x[0][0], x[1][0]
    student[0, 1, 2], student[1, 2, 17], student[0, 3] = torch.nan, torch.inf, -torch.inf
    student[:, 4] *= 1e4
    teacher[0, 4] *= 1e4
    teacher[1, 5, 3] = torch.nan
    compare("soft_cross_entropy_rows", *x, True, True)
    compare("soft_cross_entropy_rows_backward", torch.randn(2, 6), *x, True, [True])
    compare("softmax_center", student[0], None, 0.05)
    x[3] = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    compare("soft_cross_entropy", *x, True, True, [True, True])
    assert launcher("soft_cross_entropy")(*x, True, True, [True, True])[0].isfinite()


def test_nothing_to_learn(compare: Callable) -> None:
    """Weights of zero make a mean of zero by zero, and no gradient; so do no samples."""
    x = operands(2, 2, 2, 5)
    x[3] = torch.zeros(2)
    compare("soft_cross_entropy", *x, True, True, [True, True])
    compare("soft_cross_entropy", *x, True, False, [True, True])
    for mean in (True, False):
        compare("soft_cross_entropy", *operands(2, 2, 0, 5), True, mean, [True, False])
        compare("linear_soft_cross_entropy", *layers(2, 2, 0, 5, 3), True, mean, False, 0, [True, True])
    compare("soft_cross_entropy_rows", *operands(2, 2, 0, 5), True, False)
    compare("softmax_center", torch.empty(0, 5), None, 0.04)


# what is short: prototypes, samples, with one tile and with several; the interpreter's tiles are of 64 elements
SINKHORN = [(1, 1), (33, 5), (40, 17), (5, 37), (17, 18), (3, 16)]


@pytest.mark.parametrize(("samples", "prototypes"), SINKHORN)
def test_sinkhorn(compare: Callable, samples: int, prototypes: int) -> None:
    compare("sinkhorn_knopp", logits(1, samples, prototypes)[0], 3, 0.05)
    compare("sinkhorn_center", logits(2, samples, prototypes), 2, 0.05)
    compare("sinkhorn_knopp", strided(logits(2, samples, prototypes, BF16)), 1, 0.1)
    compare("sinkhorn_center", strided(logits(2, samples, prototypes, F16)), 1, 0.1)


@pytest.mark.parametrize("short", [4, 4096], ids=["long", "short"])
@pytest.mark.parametrize(("samples", "prototypes"), [*SINKHORN, (0, 5)])
def test_sinkhorn_sweep(
    compare: Callable, samples: int, prototypes: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank adds to the sums of all; -inf where it has nothing to add."""
    monkeypatch.setattr("sslkernels.triton._distillation_sinkhorn.SHORT", short)
    x = logits(2, samples, prototypes)
    x[0, :, 0] = -torch.inf
    compare("sinkhorn_sweep", x, None, 0.05)
    compare("sinkhorn_sweep", logits(1, samples, prototypes)[0], None, 0.05)
    center = torch.randn(2, prototypes) / 2
    compare("sinkhorn_sweep", logits(2, samples, prototypes), center, 0.5)
    compare("sinkhorn_sweep", strided(logits(2, samples, prototypes, BF16)), center, 0.5)
    compare("sinkhorn_sweep", logits(1, samples, prototypes, F16)[0], center[0], 0.5)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_of_two_long_sides(compare: Callable, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkernels.triton._distillation_sinkhorn.SHORT", 4)
    compare("sinkhorn_knopp", strided(logits(2, 9, 18)), iterations, 0.05)
    compare("sinkhorn_center", logits(1, 18, 5), iterations, 0.05)


@pytest.mark.parametrize("short", [4, 4096], ids=["long", "short"])
@pytest.mark.parametrize(("samples", "prototypes"), [(5, 7), (7, 5)])
@pytest.mark.parametrize("iterations", [1, 2])
def test_sinkhorn_of_infinities(
    compare: Callable, samples: int, prototypes: int, iterations: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NaN or +inf makes a view NaN, as a prototype of -inf and, with iterations, a sample of -inf; one -inf is
    a code of zero."""
    monkeypatch.setattr("sslkernels.triton._distillation_sinkhorn.SHORT", short)
    x = logits(6, samples, prototypes)
    x[0, 2, 3] = torch.nan
    x[1, 2, 3] = torch.inf
    x[2, :, 3] = -torch.inf
    x[3, 2] = -torch.inf
    x[4, 2, 3] = -torch.inf
    x[5] *= 1e3
    compare("sinkhorn_knopp", x, iterations, 0.05, tolerance=1e-3)
    assert torch.ops.sslkernels.sinkhorn_knopp(x, iterations, 0.05)[4:].isfinite().all()


def layers(
    students: int, teachers: int, batch: int, width: int, depth: int, dtype: torch.dtype = F32,
    *, center: int = 1, weighted: bool = False, shared: bool = False,
) -> list[Any]:  # fmt: skip
    """student, weight, teacher, teacher_weight, center, row_weight, temperatures."""
    (_, _, c, w, *temperatures) = operands(students, teachers, batch, width, center=center, weighted=weighted)
    student, teacher = (torch.randn(n, batch, depth).to(dtype) for n in (students, teachers))
    weight, other = (torch.nn.functional.normalize(torch.randn(width, depth)).to(dtype) for _ in range(2))
    return [student, weight, teacher, None if shared else other, c, w, *temperatures]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("students", "teachers"), [(3, 2), (1, 2), (2, 1), (2, 3)])
def test_linear(compare: Callable, students: int, teachers: int, dtype: torch.dtype) -> None:
    x = layers(students, teachers, 3, 37, 19, dtype, center=teachers, weighted=teachers == 2)
    tolerance = {F32: None, BF16: 1.6e-2, F16: 2e-3}[dtype]  # slopes are rounded as the operands are
    compare("linear_soft_cross_entropy", *x, True, True, True, 0, [True, True], tolerance=tolerance)


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (16, 16), (17, 32), (33, 5)])
def test_linear_sizes(compare: Callable, width: int, depth: int) -> None:
    x = layers(9, 2, 2, width, depth, center=0, shared=True)
    compare("linear_soft_cross_entropy", *x, False, False, False, 0, [True, True])


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True), (False, False)])
def test_linear_panels(compare: Callable, mask: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile of prototypes is a panel: gradients of students add up, those of prototypes are side by side."""
    monkeypatch.setattr("sslkernels.triton._distillation_linear.SMALLEST", 1)
    x = layers(3, 2, 2, 53, 7, weighted=True)
    x[0], x[1] = strided(x[0]), strided(x[1])
    compare("linear_soft_cross_entropy", *x, True, True, False, 0, list(mask))


def test_linear_of_mixed_dtypes(compare: Callable) -> None:
    student, weight, teacher, other, *rest = layers(2, 2, 2, 19, 7)
    compare("linear_soft_cross_entropy", student.bfloat16(), weight, teacher, other.half(), *rest, *LINEAR_OPTIONS)


def test_linear_extremes(compare: Callable) -> None:
    """A NaN makes its row's slopes NaN; a sample of weight zero, and a view without a teacher, have none."""
    x = layers(2, 1, 3, 19, 7)
    x[0][1] *= 1e3
    compare("linear_soft_cross_entropy", *x, *LINEAR_OPTIONS)
    x[5] = torch.tensor([1.0, 0.0, 1.0])
    x[2][0, 1] = torch.nan
    compare("linear_soft_cross_entropy", *x, *LINEAR_OPTIONS)
    x[0][0, 1] = torch.nan
    compare("linear_soft_cross_entropy", *x, *LINEAR_OPTIONS)
    assert not launcher("linear_soft_cross_entropy")(*x, *LINEAR_OPTIONS)[3].isnan().any()
    x[0][1, 2] = torch.nan
    compare("linear_soft_cross_entropy", *x, *LINEAR_OPTIONS)


def test_same_bits() -> None:
    soft = (*operands(3, 2, 3, 35, weighted=True), True, True, [True, True])
    linear = (*layers(3, 2, 3, 35, 9), *LINEAR_OPTIONS)
    for name, arguments in (("soft_cross_entropy", soft), ("linear_soft_cross_entropy", linear)):
        first, second = (launcher(name)(*arguments) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_losses_through_the_dispatcher(triton_serves: Callable) -> None:
    """Values and gradients of the public functions, float32 by Triton and float64 by the reference."""
    student, teacher, weight = torch.randn(3, 2, 18), torch.randn(2, 2, 18), torch.randn(20, 18) / 4

    def run(dtype: torch.dtype) -> list[Tensor]:
        s, t, w = (x.to(dtype) for x in (student, teacher, weight))
        s, w = s.requires_grad_(), w.requires_grad_()
        views = ops.sinkhorn_center(t, epsilon=0.5)
        losses = (
            ops.soft_cross_entropy(list(s), list(t), views, teacher_temp=0.5),
            ops.soft_cross_entropy(s * 0.5, t, inplace=True),
            ops.soft_cross_entropy(s, t, row_weight=t[0, :, 0].abs(), reduction="none").square().sum(),
            ops.linear_soft_cross_entropy(s, w, t, student_temp=1.0),
        )
        return [*losses, *torch.autograd.grad(sum(losses), (s, w))]

    for x, y in zip(run(F32), run(torch.float64), strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm()
    names = "soft_cross_entropy", "soft_cross_entropy_", "soft_cross_entropy_rows", "soft_cross_entropy_rows_backward"
    assert triton_serves() >= {*names, "linear_soft_cross_entropy", "sinkhorn_center"}
