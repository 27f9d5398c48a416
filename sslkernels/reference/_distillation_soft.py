# SPDX-License-Identifier: Apache-2.0
"""The parts of soft cross-entropy, and its ops as the dispatcher calls them where no compiled kernel serves.

Signatures of the ops are the schemas'. Gradients are written out, because autograd does not record below the
dispatcher. Views are a list of (B, V).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sslkernels.reference._precision import compute_dtype


def split_views(xs: Iterable[Tensor]) -> list[Tensor]:
    """Every view of tensors (B, V) and (S_i, B, V), in order."""
    return [view for x in xs for view in (x if x.ndim == 3 else [x])]


def pairs(students: int, teachers: int, exclude: bool) -> int:
    return students * teachers - (min(students, teachers) if exclude else 0)


def centers(center: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(1, V), or (T, V) if each teacher view has its own."""
    return None if center is None else center.detach().reshape(-1, center.shape[-1]).to(dtype)


def row_weights(row_weight: Tensor | None, view: Tensor, dtype: torch.dtype) -> Tensor:
    return view.new_ones(view.shape[0], dtype=dtype) if row_weight is None else row_weight.detach().to(dtype)


def teacher_mean(teacher: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    total = sum((x.sum(0, dtype=dtype) for x in teacher), torch.zeros_like(teacher[0][0], dtype=dtype))
    return total / (len(teacher) * teacher[0].shape[0])


def targets(
    teacher: Sequence[Tensor], center: Tensor | None, teacher_temp: float, students: int, exclude: bool
) -> list[tuple[Tensor, int]]:
    """For each student view the sum of the teacher's probabilities over the pairs it is in, and their number."""
    p = [
        torch.softmax((t if center is None else t - center[v if len(center) > 1 else 0]) / teacher_temp, -1)
        for v, t in enumerate(teacher)
    ]
    zero = torch.zeros_like(p[0])
    everyone = (sum(p, zero), len(p))
    others = [(sum((q for u, q in enumerate(p) if u != v), zero), len(p) - 1) for v in range(len(p) if exclude else 0)]
    return [others[v] if v < len(others) else everyone for v in range(students)]


def _shifted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x - max, where the maximum is, and how much more than 1 the exponentials of x - max sum to."""
    largest, at = x.max(-1, keepdim=True)
    if x.requires_grad:
        # where one element has most of the mass, its derivative is minus the sum of the others; else that sum is longer
        sure = (x - largest).detach().exp().sum(-1, keepdim=True) < 2
        d = x - torch.where(sure, largest, largest.detach())
        own = torch.where(sure, (largest - largest).detach(), d.gather(-1, at))
    else:
        d, own = x - largest, largest - largest
    d = d.scatter(-1, at, own)
    return d, at, d.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True) + own.expm1()


def row_losses(x: Tensor, p: Tensor, number: int, temperature: float, weights: Tensor) -> Tensor:
    """w sum_v p_v (lse - x_v), with x over its temperature: no term is negative, so nothing cancels near agreement.

    A row that is in no pair, or of weight zero, is not read.
    """
    if number == 0:
        return torch.zeros_like(weights)
    skipped = (weights == 0)[:, None]
    d, _, excess = _shifted(x.masked_fill(skipped, 0.0) / temperature)
    return weights * ((p.masked_fill(skipped, 0.0) * -d).sum(-1) + number * excess[:, 0].log1p())


def _slopes(x: Tensor, p: Tensor, number: int, temperature: float) -> Tensor:
    """d(row)/dx = (number softmax(x) - p) / temperature."""
    x = x / temperature
    _, at, excess = _shifted(x)
    slopes = number * torch.softmax(x, -1) - p
    # the slopes sum to zero: where one prototype has most of the mass, its own is that of the others
    own = torch.where(excess < 1, -slopes.scatter(-1, at, 0.0).sum(-1, keepdim=True), slopes.gather(-1, at))
    return slopes.scatter(-1, at, own) / temperature


def _operands(students, teachers, center, row_weight, teacher_temp, exclude):
    s, t = split_views(students), split_views(teachers)
    dtype = compute_dtype(*s, *t)
    constants = targets([x.to(dtype) for x in t], centers(center, dtype), teacher_temp, len(s), exclude)
    return s, t, dtype, constants, row_weights(row_weight, s[0], dtype)


def _gradients(students, constants, temperature, weights, wanted, factor) -> list[Tensor]:
    """factor * weights (S, B) * slopes, in the students' shapes and dtypes."""
    out, first = [], 0
    for x, needed in zip(students, wanted):
        views = split_views([x])
        rows = range(first, first + len(views))
        first += len(views)
        if not needed:
            out.append(x.new_empty(0))
            continue
        gradient = x.new_empty(x.shape)
        for i, view, g in zip(rows, views, split_views([gradient])):
            w = weights[i, :, None]
            p, number = constants[i]
            slopes = _slopes(view.to(w.dtype), p, number, temperature) * (w * factor)
            g.copy_(slopes.masked_fill_(w == 0, 0.0))
        out.append(gradient)
    return out


def emission_scale(weights: Tensor, teachers: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """What the emitted gradient must be multiplied with: 1, but for float16 whatever fills its range best."""
    if dtype != torch.float16 or not len(weights):
        return weights.new_ones(())
    scale = weights.abs().max() * (teachers / temperature / 2**15)
    return torch.where(scale > 0, scale, 1.0)


def forward(students, teachers, center, row_weight, student_temp, teacher_temp, exclude, mean, wanted):
    """[loss, mean of the teacher, scale, emitted gradient of each student]; `wanted` ends with that of the mean."""
    s, t, dtype, constants, weights = _operands(students, teachers, center, row_weight, teacher_temp, exclude)
    rows = torch.stack([row_losses(x.to(dtype), p, m, student_temp, weights) for x, (p, m) in zip(s, constants)])
    norm = 1 / (pairs(len(s), len(t), exclude) * weights.sum()) if mean else weights.new_ones(())
    shares = torch.where(weights == 0, 0.0, weights * norm)
    scale = emission_scale(shares, len(t), student_temp, s[0].dtype)
    spread = shares.expand(len(s), -1)
    gradients = _gradients(students, constants, student_temp, spread, wanted[:-1], 1 / scale)
    total = teacher_mean(t, dtype) if wanted[-1] else rows.new_empty(0)
    return [rows.sum() * norm, total, scale, *gradients]


def forward_(students, *options):
    """`forward`, its gradients written over the students: loss, mean of the teacher, scale."""
    loss, mean, scale, *gradients = forward(students, *options)
    for x, g in zip(students, gradients):
        if g.shape == x.shape:
            x.copy_(g)
    return loss, mean, scale


def rows_forward(students, teachers, center, row_weight, student_temp, teacher_temp, exclude, need_mean):
    s, t, dtype, constants, weights = _operands(students, teachers, center, row_weight, teacher_temp, exclude)
    rows = torch.stack([row_losses(x.to(dtype), p, m, student_temp, weights) for x, (p, m) in zip(s, constants)])
    return [rows, teacher_mean(t, dtype) if need_mean else rows.new_empty(0)]


def rows_backward(grad, students, teachers, center, row_weight, student_temp, teacher_temp, exclude, wanted):
    _, _, _, constants, weights = _operands(students, teachers, center, row_weight, teacher_temp, exclude)
    return _gradients(students, constants, student_temp, grad * weights, wanted, 1.0)


def softmax_center(logits, center, temperature):
    x = logits.to(compute_dtype(logits))
    shifted = x if center is None else x - center.to(x.dtype)
    return torch.softmax(shifted / temperature, -1), x.reshape(-1, x.shape[-1]).mean(0)
