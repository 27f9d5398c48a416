# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy with a teacher's probabilities, every pair of views in one visit; `distillation.py` has the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops import _distillation_views as views
from sslkernels.ops import _soft_cross_entropy as op
from sslkernels.ops._distillation_views import Views
from sslkernels.ops._emitted import wants_grad

__all__ = ["soft_cross_entropy", "softmax_center"]


def soft_cross_entropy(
    student: Views,
    teacher: Views,
    center: Tensor | None = None,
    *,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    exclude_same_view: bool = True,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_center: bool = False,
    inplace: bool = False,
) -> Any:
    """Cross-entropy of student logits with a teacher's centred probabilities, over all pairs of different views.

        p_{t,b}   = softmax((teacher_{t,b} - center) / teacher_temp)               a constant
        q_{s,b}   = softmax(student_{s,b} / student_temp)
        row_{s,b} = w_b sum_t -sum_v p_{t,b,v} log q_{s,b,v}         t != s unless exclude_same_view is False
        result    = sum_{s,b} row_{s,b} / (pairs * sum_b w_b), their sum, or each of the rows

    pairs is the number of (t, s): 18 for DINO's 2 teacher and 10 student views. The pairs of one student view have one
    log-softmax in common, so each row is read once, whatever their number: with m_s teachers, whose p sum to T_s,
    row = m_s lse_s - <T_s, s>, formed as sum_v T_s,v (lse - s_v), which does not cancel where student and teacher
    agree. Without views, (N, V), row i of the student meets row i of the teacher.

    Args:
        student: (N, V); or (S, B, V), S views of B samples; or a list of (B, V) and (S_i, B, V), of one dtype, whose
            views count in order. Views as they come from a model need not be stacked.
        teacher: as student, with T views; (N, V) iff student is. Any floating dtype, also another than student's.
        center: (V,) or what squeezes to it; (T, V) is one a teacher view. It may be `sinkhorn_center(teacher)`.
        student_temp, teacher_temp: numbers above zero.
        row_weight: (B,) or (N,), constant. A sample of weight zero costs nothing.
        reduction: "mean" over pairs and samples (NaN without samples), "sum", or "none": (S, B), for (N, V) (N,).
        return_center: also return the mean of the teacher's logits over all its rows, (V,): what the momentum update
            of a centre wants, from the same visit.
        inplace: write the gradient over the student's logits, which saves a tensor of their size. Safe where nobody
            reads the logits later: those of a linear layer, which does not keep them. Autograd raises its usual error
            where an operation has kept them for its backward; that you don't is up to you. One backward only. Where no
            gradient is required nothing is written; compiled code takes the ordinary way.

    Returns:
        float32, float64 if student or teacher is: the loss, then the teacher's mean if asked for. Not cast under
        autocast. The gradient has the student's dtype; float16 waits scaled, so that a gradient scaler finds it whole.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; no pair of different views; inplace with
            reduction="none", with a leaf that requires a gradient, or with logits that share memory with each other or
            with the teacher.

    Example:
        >>> student, teacher = torch.randn(10, 4, 512, requires_grad=True), torch.randn(2, 4, 512)
        >>> loss, mean = soft_cross_entropy(student, teacher, torch.zeros(512), return_center=True)
        >>> loss.backward()

    Source: DINO (arXiv:2104.14294) `main_dino.py::DINOLoss`, whose loop over pairs this is; iBOT, DINOv2, SwAV.
    """
    check.choice("reduction", reduction, ("mean", "sum", "none"))
    temperatures = views.temperatures(student_temp=student_temp, teacher_temp=teacher_temp)
    s, t, rows_only = views.two_sides(student, teacher, "V")
    _check_match(s, t)
    exclude = views.excluding(exclude_same_view, rows_only, s, t)
    center = views.centers(center, t[0].shape[-1], t[0], views.count(t))
    row_weight = views.sample_weights(row_weight, s[0])
    if inplace and reduction == "none":
        raise ValueError('inplace must be False for reduction="none", whose gradient is not known in the forward')
    t = [x.detach() if x.requires_grad else x for x in t]
    options = (t, center, row_weight, *temperatures, exclude)
    if reduction == "none":
        loss, mean = op.rows(s, *options, return_center)
        loss = loss[0] if rows_only else loss
    else:
        needed = wants_grad(*s)
        overwrite = inplace and any(needed) and not torch.compiler.is_compiling()
        if overwrite:
            _check_overwritable(s, needed, t)
        total = op.total_in_place if overwrite else op.total
        loss, mean, *_ = total(s, *options, reduction == "mean", [*needed, return_center])
    return (loss, mean) if return_center else loss


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor | None = None, temperature: float = 0.04) -> tuple[Tensor, Tensor]:
    """A teacher's centred probabilities, and the mean of its logits for the next centre, in one pass. No gradient.

        probabilities = softmax((logits - center) / temperature)        over the last dimension
        mean          = mean over all rows of logits

    Args:
        logits: (..., V), of any floating dtype.
        center: (V,) or what squeezes to it.

    Returns:
        probabilities (..., V) and mean (V,) (NaN without rows), float32, float64 if logits are.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; a temperature that is not above zero.

    Example:
        >>> p, mean = softmax_center(torch.randn(2, 4, 512), torch.zeros(512))
        >>> p.shape, mean.shape
        (torch.Size([2, 4, 512]), torch.Size([512]))

    Source: DINO `main_dino.py::DINOLoss`; DINOv2 `dino_clstoken_loss.py::softmax_center_teacher`.
    """
    check.floating("logits", logits)
    (number,) = views.temperatures(temperature=temperature)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V > 0, got {tuple(logits.shape)}")
    center = views.centers(center, logits.shape[-1], logits, 1)
    center = None if center is None else center[0]
    p, mean = op.softmax_center(logits.reshape(-1, logits.shape[-1]), center, number)
    return p.reshape(logits.shape), mean


def _check_match(s: Sequence[Tensor], t: Sequence[Tensor]) -> None:
    for name, xs in (("student", s), ("teacher", t)):
        for i, x in enumerate(xs):
            if x.dtype != xs[0].dtype:
                raise TypeError(f"{name}[{i}] must have the dtype of {name}[0] ({xs[0].dtype}), got {x.dtype}")
    if s[0].shape[-2:] != t[0].shape[-2:]:
        expected, got = tuple(s[0].shape[-2:]), tuple(t[0].shape[-2:])
        raise ValueError(f"teacher must have the samples and prototypes of student, {expected}, got {got}")


def _check_overwritable(student: Sequence[Tensor], needed: Sequence[bool], teacher: Sequence[Tensor]) -> None:
    """The gradient may take the place of these logits, as far as can be seen."""
    read = [_span(x) for x in teacher if _has_memory(x)]
    seen = set()
    for i, x in enumerate(student):
        name = f"student[{i}]" if len(student) > 1 else "student"
        if not needed[i]:
            continue
        if x.is_leaf:
            raise ValueError(f"inplace needs logits that a layer has made, but {name} is a leaf that requires grad")
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride()))
        if _has_memory(x):
            start, end = _span(x)
            overlaps |= start in seen or any(start < last and first < end for first, last in read)
            seen.add(start)
        if overlaps:
            raise ValueError(f"inplace needs logits with memory of their own, but {name} overlaps in memory")


def _has_memory(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" and x.numel() > 0


def _span(x: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()
