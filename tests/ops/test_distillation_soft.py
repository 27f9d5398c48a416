# SPDX-License-Identifier: Apache-2.0
"""soft_cross_entropy against DINO's, iBOT's and DINOv2's own formulas in float64; softmax_center against torch."""

from __future__ import annotations

from typing import Any

import distillation_cases as cases
import pytest
import torch
from distillation_cases import check, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import ops

F32, F64 = torch.float32, torch.float64
# one prototype, primes, a vector of 16 and its neighbours, a chunk of the kernel and its neighbours, several chunks
WIDTHS = (1, 2, 3, 15, 16, 17, 67, 2047, 2048, 2049, 4099, 6145)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def divided(x: Tensor, cuts: list[int]) -> list[Tensor]:
    """(S, B, V) as a list of (B, V) and (S_i, B, V)."""
    parts = [part for part in x.tensor_split(cuts) if len(part)]
    return [part[0] if len(part) == 1 and i % 2 else part for i, part in enumerate(parts)]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    teachers = draw(st.integers(1, 4))
    students = draw(st.none() | st.integers(1 if teachers > 1 else 2, 6))
    teachers = 1 if students is None else teachers
    torch.manual_seed(draw(st.integers(0, 99)))
    case = random_case(
        students,
        teachers,
        draw(st.integers(1, 5)),
        draw(st.sampled_from(WIDTHS)),
        dtypes=(draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))),
        center=draw(st.sampled_from(["none", "one", "each"])) if students else "one",
        weighted=draw(st.booleans()),
        size=draw(st.sampled_from([0.1, 0.5])),
    )
    if students is not None and draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, students), max_size=3)))
        case = case._replace(student=divided(case.student[0], cuts), teacher=divided(case.teacher[0], [1]))
    options = {
        "student_temp": draw(st.sampled_from([0.1, 0.07, 1.0])),
        "teacher_temp": draw(st.sampled_from([0.04, 0.07, 1.0])),
        "exclude_same_view": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    shape = cases.written_out(case, **options).shape
    check(case, torch.randn(shape) if options["reduction"] == "none" else None, **options)


def test_dino() -> None:
    """2 teacher and 10 student views, from tensors (views * B, V) as the original's."""
    batch, width = 4, 1031
    student, teacher = torch.randn(10 * batch, width, dtype=F64), torch.randn(2 * batch, width, dtype=F64)
    center = torch.randn(1, width, dtype=F64)
    total, terms = torch.zeros((), dtype=F64), 0
    for iq, q in enumerate(torch.softmax((teacher - center) / 0.04, -1).chunk(2)):
        for v, s in enumerate((student / 0.1).chunk(10)):
            if v == iq:
                continue
            total += torch.sum(-q * torch.log_softmax(s, -1), -1).mean()
            terms += 1
    loss, mean = ops.soft_cross_entropy(
        student.view(10, batch, width), teacher.view(2, batch, width), center, return_center=True
    )
    torch.testing.assert_close(loss, total / terms)
    torch.testing.assert_close(mean, teacher.mean(0))


def test_ibot() -> None:
    """The masked mean over each image's tokens: row_weight is mask / max(1, masked), over all tokens or the masked."""
    images, tokens, width = 3, 9, 517
    student, teacher = torch.randn(2, images, tokens, width, dtype=F64)
    mask = torch.rand(images, tokens) < 0.4
    mask[1] = False
    q = torch.softmax((teacher - 0.1) / 0.07, -1)
    rows = torch.sum(-q * torch.log_softmax(student / 0.1, -1), -1)
    wanted = (torch.sum(rows * mask, -1) / mask.sum(-1).clamp(min=1.0)).mean()
    weight = (mask / mask.sum(-1, keepdim=True).clamp(min=1) / images).flatten()
    center = torch.full((1, 1, width), 0.1, dtype=F64)
    options: dict[str, Any] = {"teacher_temp": 0.07, "reduction": "sum"}
    s, t = (x.flatten(0, 1) for x in (student, teacher))
    torch.testing.assert_close(ops.soft_cross_entropy(s, t, center, row_weight=weight, **options), wanted)
    keep = mask.flatten()
    masked = ops.soft_cross_entropy(s[keep], t[keep], center, row_weight=weight[keep], **options)
    torch.testing.assert_close(masked, wanted)


def test_dinov2() -> None:
    """Its global term: the two crops stacked, the teacher's in reversed order, and its local term: all pairs."""
    crops, batch, width = 2, 5, 300
    student, teacher = torch.randn(crops, batch, width, dtype=F64), torch.randn(crops, batch, width, dtype=F64)
    q = torch.softmax(teacher / 0.05, -1)
    rows = -(q.flip(0).flatten(0, 1) * torch.log_softmax(student.flatten(0, 1) / 0.1, -1)).sum(-1)
    torch.testing.assert_close(ops.soft_cross_entropy(student, teacher, teacher_temp=0.05), rows.mean())
    local = torch.randn(8, batch, width, dtype=F64)
    both = -torch.einsum("tbv,sbv->", q, torch.log_softmax(local / 0.1, -1)) / (16 * batch)
    got = ops.soft_cross_entropy(local, teacher, teacher_temp=0.05, exclude_same_view=False)
    torch.testing.assert_close(got, both)


def test_values_by_hand() -> None:
    """softmax([0, ln 3] / 1) = [1/4, 3/4]; a flat student has log 2 whatever the teacher."""
    logits = torch.tensor([[0.0, torch.tensor(3.0).log().item()], [0.0, 0.0]])
    rows = ops.soft_cross_entropy(logits, logits[:1].expand(2, 2), student_temp=1.0, teacher_temp=1.0, reduction="none")
    entropy = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log()).item()
    assert rows.tolist() == pytest.approx([entropy, torch.tensor(2.0).log().item()])
    half = ops.soft_cross_entropy(
        logits, logits, student_temp=1.0, teacher_temp=1.0, row_weight=torch.tensor([3.0, 1.0])
    )
    assert half.item() == pytest.approx((3 * entropy + torch.tensor(2.0).log().item()) / 4)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_teacher_mean(batch: int) -> None:
    """Of all its rows, whatever the weights: more than are summed in float32 at once, far from zero."""
    case = random_case(3, 2, batch, 2311)
    teacher = case.teacher[0] + 1000
    weight = (torch.arange(batch) % 2).float()
    exact = teacher.double().mean((0, 1))
    for options in ({}, {"row_weight": weight}, {"reduction": "none"}):
        _, mean = ops.soft_cross_entropy(case.student[0], teacher, return_center=True, **options)
        assert mean.dtype == F32
        torch.testing.assert_close(mean.double(), exact, rtol=3e-7, atol=0.0)
    mean = ops.softmax_center(teacher)[1]
    torch.testing.assert_close(mean.double(), exact, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 2049), (2, 4, 67), (0, 5), (2, 0, 3)], ids=str)
def test_softmax_center(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, center = torch.randn(shape).to(dtype), torch.randn(1, 1, shape[-1])
    wide = F64 if dtype == F64 else F32
    for layout in (x, x.mT.contiguous().mT if x.ndim > 1 else x):
        p, mean = ops.softmax_center(layout, center, 0.07)
        assert p.dtype == mean.dtype == wide and p.shape == shape
        exact = torch.softmax((x.double() - center.double().flatten()) / 0.07, -1)
        eps = torch.finfo(wide).eps * 4 * (1 + float(exact.numel() and (x.double().abs().max() + 4) / 0.07))
        torch.testing.assert_close(p.double(), exact, rtol=eps, atol=1e-30)
        flat = x.double().reshape(-1, shape[-1])
        torch.testing.assert_close(mean.double(), flat.mean(0), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not p.requires_grad
    assert not ops.softmax_center(x.requires_grad_())[0].requires_grad


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values otherwise in memory."""
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(x.dtype)
    wide[..., ::2] = x
    return {
        "every other column": wide[..., ::2],
        "batch first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "prototypes first": x.movedim(-1, 0).contiguous().movedim(0, -1),
    }


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1)))
def test_strides(layout: str, dtype: torch.dtype) -> None:
    case = random_case(4, 2, 3, 2100, dtypes=(dtype, dtype))
    moved = case._replace(student=[layouts(case.student[0])[layout]], teacher=[layouts(case.teacher[0])[layout]])
    assert moved.student[0].stride() != case.student[0].stride()
    for reduction in ("mean", "none"):
        got, want = (cases.evaluate(cases.ours, c, reduction=reduction) for c in (moved, case))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1][0], want[1][0])


def test_expanded_student_and_teacher() -> None:
    """One row for all samples, repeated without a copy."""
    case = random_case(3, 2, 4, 33)
    student, teacher = (x[0][:, :1].expand(-1, 4, -1) for x in case[:2])
    check(case._replace(student=[student], teacher=[teacher]))


def test_a_list_is_its_views_stacked() -> None:
    case = random_case(6, 2, 3, 257)
    student, teacher = case.student[0], case.teacher[0]
    parts = case._replace(
        student=[student[0], student[1:2], student[2:5], student[5]], teacher=[teacher[0], teacher[1]]
    )
    for reduction in ("mean", "sum", "none"):
        got, want = (cases.evaluate(cases.ours, c, reduction=reduction) for c in (parts, case))
        assert torch.equal(got[0], want[0])
        assert torch.equal(torch.cat([g.reshape(-1, 3, 257) for g in got[1]]), want[1][0])


def test_only_wanted_gradients() -> None:
    """A frozen view of a list has none, and the others are the same."""
    case = random_case(4, 2, 3, 65)
    views = list(case.student[0])
    want = cases.evaluate(cases.ours, case)[1][0]
    leaves = [x.clone().requires_grad_(i != 1) for i, x in enumerate(views)]
    ops.soft_cross_entropy(leaves, case.teacher[0], case.center).backward()
    assert leaves[1].grad is None
    for i in (0, 2, 3):
        assert torch.equal(leaves[i].grad, want[i])  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_sample_of_weight_zero_is_not_read(reduction: str) -> None:
    case = random_case(3, 2, 5, 70, weighted=True)
    weight = case.row_weight
    assert weight is not None
    weight[[0, 3]] = 0.0
    want = cases.evaluate(cases.ours, case, reduction=reduction)
    check(case, torch.randn(3, 5) if reduction == "none" else None, reduction=reduction)
    for x in (case.student[0], case.teacher[0]):
        x[:, [0, 3]] = torch.nan
    value, (grad,) = cases.evaluate(cases.ours, case, reduction=reduction)
    assert torch.equal(value, want[0]) and torch.equal(grad, want[1][0])
    assert not grad[:, [0, 3]].any()


@pytest.mark.parametrize("shape", [(3, 0, 5), (0, 5)], ids=str)
def test_no_samples(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss, mean = ops.soft_cross_entropy(student, teacher, return_center=True)
    assert loss.isnan() and mean.isnan().all() and mean.shape == (5,)
    assert ops.soft_cross_entropy(student, teacher, reduction="none").shape == shape[:-1]
    total = ops.soft_cross_entropy(student, teacher, reduction="sum")
    total.backward()
    assert total == 0 and student.grad is not None and student.grad.shape == shape


def test_a_student_view_without_a_pair() -> None:
    """One teacher view and its own student view: no loss, a gradient of zero."""
    case = random_case(3, 1, 2, 40)
    case.student[0][0] = torch.nan
    value, (grad,) = cases.evaluate(cases.ours, case)
    assert value.isfinite() and not grad[0].any() and grad[1:].any()
    rows = cases.ours(case, reduction="none")
    assert not rows[0].any()
