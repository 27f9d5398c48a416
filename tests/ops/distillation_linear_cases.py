# SPDX-License-Identifier: Apache-2.0
"""linear_soft_cross_entropy written out as the originals have it: in float64 the truth, else eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops

Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Case(NamedTuple):
    student: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor | None = None
    center: Tensor | None = None
    row_weight: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(None if x is None else x.to(dtype) for x in self))


def random_case(
    students: int, teachers: int, batch: int, width: int, depth: int, dtype: torch.dtype = torch.float32
) -> Case:
    """Unit rows, as from DINO's head, with a centre a view and one sample that does not count."""
    unit = F.normalize
    row_weight = torch.rand(batch) + 0.5
    row_weight[batch // 2 : batch // 2 + batch // 4] = 0
    return Case(
        unit(torch.randn(students, batch, depth), dim=-1),
        unit(torch.randn(width, depth), dim=-1),
        unit(torch.randn(teachers, batch, depth), dim=-1),
        unit(torch.randn(width, depth), dim=-1),
        0.1 * torch.randn(teachers, width),
        row_weight,
    ).to(dtype)


def agreeing_case(students: int, teachers: int, batch: int, width: int, depth: int, norm: float) -> Case:
    """Student and teacher are near one prototype a sample: the longer the prototypes, the smaller the loss."""
    weight = F.normalize(torch.randn(width, depth), dim=-1)
    near = weight[torch.randint(width, (batch,))]
    student, teacher = (F.normalize(near + 0.01 * torch.randn(n, batch, depth), dim=-1) for n in (students, teachers))
    return Case(student, norm * weight, teacher)


def written_out(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the mean of the teacher's logits."""
    t = teacher_logits(case)
    return pair_by_pair(F.linear(case.student, case.weight), t, case, **options), t.flatten(0, 1).mean(0)


def teacher_logits(case: Case) -> Tensor:
    return F.linear(case.teacher, case.weight.detach() if case.teacher_weight is None else case.teacher_weight)


def pair_by_pair(
    x: Tensor,
    t: Tensor,
    case: Case,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    exclude_same_view: bool = True,
    reduction: str = "mean",
    log_probability: Callable[[Tensor], Tensor] = lambda row: row.log_softmax(-1),
) -> Tensor:
    """The loop over pairs of DINO's loss."""
    center, row_weight = case[-2:]
    p = ((t if center is None else t - center.view(-1, 1, center.shape[-1])) / teacher_temp).softmax(-1)
    counts = x.new_ones(x.shape[1]) if row_weight is None else row_weight
    total, pairs = x.new_zeros(()), 0
    for i, q in enumerate(p):
        for j, row in enumerate(x / student_temp):
            if exclude_same_view and i == j:
                continue
            total = total + (counts * -(q * log_probability(row)).sum(-1)).sum()
            pairs += 1
    return total / (pairs * counts.sum()) if reduction == "mean" else total


def ours(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    *first, row_weight = case
    return ops.linear_soft_cross_entropy(*first, row_weight=row_weight, return_center=True, **options)


def evaluate(function: Any, case: Case, frozen: bool = False, **options: Any) -> Results:
    """Loss, mean of the logits, gradients of student and weight (where they are not frozen)."""
    student = case.student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight = case.weight.detach().clone(memory_format=torch.preserve_format).requires_grad_(not frozen)
    loss, mean = function(case._replace(student=student, weight=weight), **options)
    grads = torch.autograd.grad(loss, [student] if frozen else [student, weight])
    return loss.detach(), mean.detach(), grads[0], grads[-1]


def sums_of_terms(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """What the gradients of student and weight would be if nothing were subtracted: m softmax + T, no negative term."""
    x = F.linear(case.student, case.weight).requires_grad_()
    options["log_probability"] = lambda row: -(row + row.logsumexp(-1, keepdim=True))
    (slopes,) = torch.autograd.grad(pair_by_pair(x, teacher_logits(case), case, **options), x)
    return slopes @ case.weight.abs(), slopes.flatten(0, 1).T @ case.student.abs().flatten(0, 1)


def check(case: Case, frozen: bool = False, **options: Any) -> None:
    """Never more than twice eager's error in the same precision, plus roundings.

    BLAS adds the terms of a product in another order than eager's: a logit is off by a rounding of its size, which
    passes, over the temperature, into every probability. Probabilities are rounded before one is subtracted from the
    other, and the terms of a gradient may cancel; near agreement, where all do, a test of its own is stricter. BLAS may
    add n of them one by one, whose roundings walk as sqrt(n) does. A gradient is rounded once more to the dtype of what
    it belongs to.
    """
    wide = case.to(torch.float64)
    exact = evaluate(written_out, wide, frozen, **options)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in case[:4]) else torch.float32
    eager = evaluate(written_out, case.to(dtype), frozen, **options)
    results = evaluate(ours, case, frozen, **options)
    shapes = ((), (case.weight.shape[0],), case.student.shape, case.student.shape if frozen else case.weight.shape)
    dtypes = (dtype, dtype, case.student.dtype, case.student.dtype if frozen else case.weight.dtype)
    eps = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    steep = 2 * float(F.linear(wide.student, wide.weight).abs().max()) / options.get("student_temp", 0.1)
    terms = sums_of_terms(wide, **options)
    steps = [terms_added**0.5 for terms_added in (16, 16, 16 + case.weight.shape[0], 16 + case.student[..., 0].numel())]
    sizes = [x.norm() for x in (*exact[:2], *terms)]
    roundings = [eps * k * x for k, x in zip(steps, sizes)]
    if frozen:
        roundings[3] = roundings[2]
    for name, x, e, g, shape, own, rounding in zip(NAMES, results, exact, eager, shapes, dtypes, roundings):
        assert x.shape == shape and x.dtype == own, (name, x.shape, x.dtype)
        if name.startswith("d"):
            rounding = rounding + (eps * steep + (torch.finfo(own).eps if own != dtype else 0)) * e.norm()
        error, allowed = (x.double() - e).norm(), 2 * (g.double() - e).norm() + rounding
        assert error <= allowed, (name, error / e.norm(), allowed / e.norm())


NAMES = ("loss", "mean", "dstudent", "dweight")
