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

from sslkernels.reference._precision import compute_dtype


def views(x: Tensor | Sequence[Tensor]) -> Tensor:
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
    s, t = views(student), views(teacher)
    logits, targets, mean = _logits_and_targets(s, weight, t, teacher_weight, center, student_temp, teacher_temp)
    scale = _row_scale(s, t, row_weight, exclude, reduction == "mean", logits.dtype)
    loss = (scale * _rows(logits, _wanted_targets(targets, len(s), exclude))).sum()
    return (loss, mean) if return_center else loss


def forward(student, weight, teacher, teacher_weight, center, row_weight, *options):
    student_temp, teacher_temp, exclude, mean_over_rows, return_center, mask = options
    logits, targets, mean = _logits_and_targets(
        student, weight, teacher, teacher_weight, center, student_temp, teacher_temp
    )
    scale = _row_scale(student, teacher, row_weight, exclude, mean_over_rows, logits.dtype)
    wanted = _wanted_targets(targets, len(student), exclude)
    loss = (scale * _rows(logits, wanted)).sum()
    none = logits.new_empty(0)
    g = none
    if any(mask):
        g = scale[..., None] / student_temp * (wanted.sum(-1, keepdim=True) * logits.softmax(-1) - wanted)
    dstudent = g @ weight.to(g.dtype) if mask[0] else none
    dweight = g.flatten(0, 1).T @ student.flatten(0, 1).to(g.dtype) if mask[1] else none
    return loss, mean if return_center else none, dstudent, dweight


def _logits_and_targets(s, weight, t, teacher_weight, center, student_temp, teacher_temp):
    """Student logits over their temperature (S, B, V); p (T, B, V), constant; mean of the teacher's logits (V,)."""
    other = weight if teacher_weight is None else teacher_weight
    dtype = compute_dtype(s, weight, t, other)
    logits = F.linear(s.to(dtype), weight.to(dtype)) / student_temp
    with torch.no_grad():
        teacher_logits = F.linear(t.to(dtype), other.to(dtype))
        mean = teacher_logits.flatten(0, 1).mean(0)
        if center is not None:
            teacher_logits = teacher_logits - (center if center.ndim == 1 else center[:, None]).to(dtype)
        return logits, torch.softmax(teacher_logits / teacher_temp, -1), mean


def _wanted_targets(p: Tensor, students: int, exclude: bool) -> Tensor:
    """Sum of the teachers that each student view is compared with, (S, B, V)."""
    if not exclude:
        return p.sum(0, keepdim=True).expand(students, -1, -1)
    return torch.stack([sum((q for t, q in enumerate(p) if t != s), torch.zeros_like(p[0])) for s in range(students)])


def _rows(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * torch.log_softmax(logits, -1)).sum(-1)  # (S, B)


def _row_scale(s, t, row_weight, exclude, mean, dtype) -> Tensor:
    """What each row of (S, B) counts in the loss; (B,)."""
    batch = s.shape[1]
    scale = s.new_ones(batch, dtype=dtype) if row_weight is None else row_weight.detach().to(dtype)
    pairs = len(s) * len(t) - (min(len(s), len(t)) if exclude else 0)
    return scale / (pairs * scale.sum()) if mean else scale
