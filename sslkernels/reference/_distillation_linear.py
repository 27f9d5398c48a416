# SPDX-License-Identifier: Apache-2.0
"""Soft cross-entropy of logits that a prototype layer makes, in plain differentiable PyTorch.

`linear_soft_cross_entropy` is the definition; `forward` is what the dispatcher calls where no compiled kernel serves,
with the gradients written out, because autograd does not record below the dispatcher.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.reference import _distillation_soft as soft
from sslkernels.reference._precision import compute_dtype


def stack_views(x: Tensor | Sequence[Tensor]) -> Tensor:
    """(S, B, D) of (N, D), which is one view, of (S, B, D), or of tensors (B, D) and (S_i, B, D)."""
    if isinstance(x, Tensor):
        return x if x.ndim == 3 else x[None]
    return torch.cat([v if v.ndim == 3 else v[None] for v in x])


def linear_soft_cross_entropy(
    student: Tensor | Sequence[Tensor],
    weight: Tensor,
    teacher: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | None = None,
    center: Tensor | None = None,
    *,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    exclude_same_view: bool = True,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_center: bool = False,
) -> Any:
    """See `sslkernels.ops.linear_soft_cross_entropy`."""
    exclude = exclude_same_view and not (isinstance(student, Tensor) and student.ndim == 2)
    x, t = _logits(stack_views(student), weight, stack_views(teacher), teacher_weight)  # (S, B, V), (T, B, V)
    weights = soft.row_weights(row_weight, x[0], x.dtype)
    constants = soft.targets(list(t), soft.centers(center, x.dtype), teacher_temp, len(x), exclude)
    loss = torch.stack([soft.row_losses(v, *p, student_temp, weights) for v, p in zip(x, constants)]).sum()
    if reduction == "mean":
        loss = loss / (soft.pairs(len(x), len(t), exclude) * weights.sum())
    return (loss, soft.teacher_mean(list(t), x.dtype)) if return_center else loss


def forward(student, weight, teacher, teacher_weight, center, row_weight, *rest):
    student_temp, teacher_temp, exclude, mean_over_rows, return_center, _, mask = rest
    x, t = _logits(student, weight, teacher, teacher_weight)
    options = (center, row_weight, student_temp, teacher_temp, exclude, mean_over_rows)
    loss, mean, _, g = soft.forward([x], [t], *options, [any(mask), return_center])
    none = loss.new_empty(0)
    dstudent = g @ weight.to(g.dtype) if mask[0] else none
    if row_weight is not None:  # of what does not count not even a NaN: 0 * NaN is one
        student = student.masked_fill((row_weight == 0)[:, None], 0.0)
    dweight = g.flatten(0, 1).T @ student.flatten(0, 1).to(g.dtype) if mask[1] else none
    return loss, mean, dstudent, dweight


def _logits(student, weight, teacher, teacher_weight):
    """Of student and teacher, the latter constant, in the dtype of the arithmetic."""
    other = weight if teacher_weight is None else teacher_weight
    dtype = compute_dtype(student, weight, teacher, other)
    with torch.no_grad():
        t = F.linear(teacher.to(dtype), other.to(dtype))
    return F.linear(student.to(dtype), weight.to(dtype)), t
