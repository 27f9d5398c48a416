# SPDX-License-Identifier: Apache-2.0
"""soft_cross_entropy written out as the originals' loops over pairs: in float64 the truth, in float32 eager."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels import ops


class Case(NamedTuple):
    student: list[Tensor]  # of (B, V) and (S_i, B, V), or one (N, V)
    teacher: list[Tensor]
    center: Tensor | None = None
    row_weight: Tensor | None = None
    rows_only: bool = False

    def to(self, dtype: torch.dtype) -> Case:
        moved = [[x.detach().to(dtype) for x in xs] for xs in self[:2]]
        return Case(*moved, *(None if x is None else x.to(dtype) for x in self[2:4]), self.rows_only)

    @property
    def wide(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if torch.float64 in (self.student[0].dtype, self.teacher[0].dtype) else torch.float32


def random_case(
    students: int | None,
    teachers: int,
    batch: int,
    width: int,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    center: str = "one",
    weighted: bool = False,
    size: float = 0.5,
) -> Case:
    """Views stacked in one tensor; students=None is (N, V)."""
    rows_only = students is None
    lead = [(batch,), (batch,)] if rows_only else [(students, batch), (teachers, batch)]
    s, t = (size * torch.randn(*n, width) for n in lead)
    centers = {"none": None, "one": (width,), "each": (teachers, width)}[center]
    return Case(
        [s.to(dtypes[0])],
        [t.to(dtypes[1])],
        None if centers is None else 0.3 * torch.randn(centers),
        torch.rand(batch) if weighted else None,
        rows_only,
    )


def views(xs: list[Tensor]) -> list[Tensor]:
    return [view for x in xs for view in (x if x.ndim == 3 else [x])]


def written_out(
    case: Case,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    exclude_same_view: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """DINO's double loop over pairs of views."""
    dtype = case.wide
    students, teachers = ([x.to(dtype) for x in views(xs)] for xs in case[:2])
    exclude = exclude_same_view and not case.rows_only
    weight = torch.ones(len(students[0]), dtype=dtype) if case.row_weight is None else case.row_weight.to(dtype)
    rows, pairs = [torch.zeros_like(weight) for _ in students], 0
    for t, logits in enumerate(teachers):
        center = case.center
        if center is not None:
            center = center.to(dtype).reshape(-1, logits.shape[-1])
            logits = logits - center[t if len(center) > 1 else 0]
        q = torch.softmax(logits / teacher_temp, -1).detach()
        for s, x in enumerate(students):
            if exclude and s == t:
                continue
            rows[s] = rows[s] + weight * torch.sum(-q * torch.log_softmax(x / student_temp, -1), -1)
            pairs += 1
    if reduction == "none":
        return rows[0] if case.rows_only else torch.stack(rows)
    total = torch.stack(rows).sum()
    return total / (pairs * weight.sum()) if reduction == "mean" else total


def ours(case: Case, **options: Any) -> Any:
    student, teacher = (xs[0] if len(xs) == 1 else xs for xs in case[:2])
    return ops.soft_cross_entropy(student, teacher, case.center, row_weight=case.row_weight, **options)


def evaluate(function: Any, case: Case, cotangent: Tensor | None = None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Value, and gradient of each student tensor."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in case.student]
    value = function(case._replace(student=leaves), **options)
    cotangent = torch.ones_like(value) if cotangent is None else cotangent.to(value.dtype)
    grads = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def check(case: Case, cotangent: Tensor | None = None, **options: Any) -> None:
    """Never more than twice eager's error in the same precision, plus roundings.

    A logit over its temperature is rounded relatively, so its exponential by 4 eps max|logit|: what the contract allows
    in float32. The gradient is rounded once more to the student's dtype. The formula itself, in float64, subtracts
    numbers of the size of a logit: where ours is float64 too, that is the error of what it is compared with.
    """
    exact, exact_grads = evaluate(written_out, case.to(torch.float64), cotangent, **options)
    eager, eager_grads = evaluate(written_out, case, cotangent, **options)
    value, grads = evaluate(ours, case, cotangent, **options)
    assert value.dtype == case.wide and value.shape == exact.shape
    for g, x in zip(grads, case.student):
        assert (g.dtype, g.shape) == (x.dtype, x.shape)
    eps = torch.finfo(case.wide).eps
    temperatures = options.get("student_temp", 0.1), options.get("teacher_temp", 0.04)
    largest = max(float(flat(xs).abs().max()) / tau for xs, tau in zip(case[:2], temperatures))
    roundings, oracle = 4 * eps * (1 + largest), 4 * torch.finfo(torch.float64).eps * (1 + largest)
    error, eager_error = (value - exact).abs(), (eager - exact).abs()
    assert bool((error <= 2 * eager_error + roundings * exact.abs() + oracle).all()), (error, eager_error, exact)
    got, want, plain = flat(grads), flat(exact_grads), flat(eager_grads)
    one = torch.finfo(case.student[0].dtype).eps
    oracle *= (1.0 if cotangent is None else float(cotangent.norm())) / temperatures[0]
    assert (got - want).norm() <= 2 * (plain - want).norm() + (one + roundings) * want.norm() + oracle
