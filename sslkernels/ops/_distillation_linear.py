# SPDX-License-Identifier: Apache-2.0
"""Soft cross-entropy of logits that a prototype layer makes; `distillation.py` gathers the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._autocast import cast_features
from sslkernels.ops._distillation_soft import _check_center as check_center
from sslkernels.ops._emitted import emitted_gradients, save_emitted
from sslkernels.ops._registry import define, differentiable
from sslkernels.reference import _distillation_linear as reference
from sslkernels.reference._precision import compute_dtype

__all__ = ["linear_soft_cross_entropy"]

Views = Tensor | Sequence[Tensor]

PANEL_BYTES = 8 << 20  # up to which logits are kept whole; the kernel's rule for more depends on the shapes


def linear_soft_cross_entropy(
    student: Views,
    weight: Tensor,
    teacher: Views,
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
    """`soft_cross_entropy` of the logits that a prototype layer without a bias makes, which are never stored whole.

        x_{s,b} = weight h_{s,b}                                        h: student, (S, B, D); x: (V,)
        p_{t,b} = softmax((teacher_weight g_{t,b} - center) / teacher_temp)     g: teacher, (T, B, D); constant
        row_{s,b} = sum_t H(p_{t,b}, softmax(x_{s,b} / student_temp))    t != s unless exclude_same_view is False
        mean  = sum_{s,b} w_b row_{s,b} / (pairs * sum_b w_b),  sum = sum_{s,b} w_b row_{s,b}

    A panel of logits lives at a time. The gradients of student and weight are emitted by the forward, that of weight
    only where one is required: frozen prototypes save a third of the products.

    Args:
        student: hidden rows: (N, D); (S, B, D); or a list of (B, D) and (S_i, B, D), whose views count in order.
        weight: prototypes, (V, D).
        teacher: as student, of any number of views; (N, D) iff student is: then row i meets row i.
        teacher_weight: (V, D); weight if not given. No gradient reaches it, or weight through the teacher.
        center: (V,), or what squeezes to it; (T, V) is one a teacher view.
        row_weight: (B,) or (N,), constant. A weight of zero leaves a sample out.
        reduction: "mean" over pairs and samples, or "sum".
        return_center: also return the mean of the teacher's logits over all its rows, detached: what the momentum
            update of a centre wants. It is teacher_weight times the mean of the teacher's rows.

    Returns:
        The loss, float32 (float64 if an input is), then the mean logits (V,) if asked for.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; no pair of views left; reduction="none",
            whose gradient would need all logits again (`soft_cross_entropy` of the logits has it).

    Example:
        >>> h, w = torch.randn(10, 4, 16, requires_grad=True), torch.randn(512, 16, requires_grad=True)
        >>> linear_soft_cross_entropy(h, w, torch.randn(2, 4, 16), w.detach()).backward()

    Source: DINO (arXiv:2104.14294) `main_dino.py::DINOLoss`, `vision_transformer.py::DINOHead.last_layer`.
    """
    check.choice("reduction", reduction, ("mean", "sum"))
    check.positive("student_temp", student_temp)
    check.positive("teacher_temp", teacher_temp)
    s, t = _views("student", student), _views("teacher", teacher)
    rows_only = isinstance(student, Tensor) and student.ndim == 2
    if rows_only != (isinstance(teacher, Tensor) and teacher.ndim == 2):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else f"{len(x)} tensors" for x in (student, teacher)]
        raise ValueError(f"student and teacher must both be (N, D) or both have views, got {shapes[0]} and {shapes[1]}")
    _check_layers(s, weight, t, teacher_weight)
    exclude = exclude_same_view and not rows_only
    if exclude and len(s) == len(t) == 1:
        raise ValueError("student and teacher must leave a pair of different views, got one view of each")
    if center is not None:
        check_center(center, weight.T, len(t))
        center = center.detach().reshape(-1, weight.shape[0])
    if row_weight is not None:
        check.vector("row_weight", row_weight, s.shape[1], s, check.FLOATS)
        row_weight = row_weight.detach()
    s, weight, t = cast_features(s, weight, t.detach())
    if teacher_weight is not None:
        (teacher_weight,) = cast_features(teacher_weight.detach())
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in (s, weight)]
    layers = (s, weight, t, teacher_weight, center, row_weight)
    options = (
        float(student_temp),
        float(teacher_temp),
        exclude,
        reduction == "mean",
        return_center,
        PANEL_BYTES,
        wanted,
    )
    loss, mean, *_ = _loss(*layers, *options)
    return (loss, mean) if return_center else loss


def _views(name: str, x: Any) -> Tensor:
    """(S, B, D); hidden rows are small, so that a list of views is put together."""
    several = isinstance(x, list | tuple)
    if several and not x:
        raise ValueError(f"{name} must hold at least one view, got none")
    xs = list(x) if several else [x]
    for i, view in enumerate(xs):
        label = f"{name}[{i}]" if several else name
        check.floating(label, view)
        if view.ndim not in (2, 3) or view.shape[-1] == 0 or view.shape[0 : view.ndim - 2] == (0,):
            raise ValueError(f"{label} must have shape (B, D) or (S, B, D) with D > 0, got {tuple(view.shape)}")
        if view.shape[-2:] != xs[0].shape[-2:]:
            raise ValueError(
                f"{label} must have the (B, D) of {name}[0] {tuple(xs[0].shape[-2:])}, got {tuple(view.shape)}"
            )
        check.same_device(label, view, f"{name}[0]", xs[0])
    return reference.stack_views(x)


def _check_layers(s: Tensor, weight: Any, t: Tensor, teacher_weight: Any) -> None:
    check.same_device("teacher", t, "student", s)
    if s.shape[1] != t.shape[1]:
        raise ValueError(f"teacher must have the samples of student, {s.shape[1]}, got {t.shape[1]}")
    for name, x in (("weight", weight), ("teacher_weight", teacher_weight)):
        if x is None and name == "teacher_weight":
            continue
        check.floating(name, x)
        check.same_device(name, x, "student", s)
        width = s.shape[2] if name == "weight" else t.shape[2]
        if x.ndim != 2 or x.shape[1] != width or x.shape[0] == 0:
            raise ValueError(f"{name} must have shape (V, {width}) with V > 0, got {tuple(x.shape)}")
    if teacher_weight is None and t.shape[2] != s.shape[2]:
        raise ValueError(f"teacher must have as many features as weight ({weight.shape[1]}), got {t.shape[2]}")
    if teacher_weight is not None and teacher_weight.shape[0] != weight.shape[0]:
        expected, got = weight.shape[0], teacher_weight.shape[0]
        raise ValueError(f"teacher_weight must have as many prototypes as weight ({expected}), got {got}")


def _fake(student, weight, teacher, teacher_weight, *rest):  # type: ignore[no-untyped-def]
    *_, return_center, _, mask = rest
    others = [] if teacher_weight is None else [teacher_weight]
    dtype = compute_dtype(student, weight, teacher, *others)
    shapes = (
        (),
        weight.shape[:1] if return_center else (0,),
        *(x.shape if wanted else (0,) for x, wanted in zip((student, weight), mask)),
    )
    return tuple(student.new_empty(shape, dtype=dtype) for shape in shapes)


_loss = define(
    "linear_soft_cross_entropy(Tensor student, Tensor weight, Tensor teacher, Tensor? teacher_weight, Tensor? center,"
    " Tensor? row_weight, float student_temp, float teacher_temp, bool exclude, bool mean, bool return_center,"
    " int panel_bytes, bool[2] output_mask) -> (Tensor loss, Tensor center, Tensor dstudent, Tensor dweight)",
    reference=reference.forward,
    fake=_fake,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    save_emitted(ctx, inputs[:2], inputs[-1], output[2:])


def _autograd(ctx: Any, grad: Any, *unused: Any) -> Any:
    return *emitted_gradients(ctx, grad), *(None,) * 11


differentiable(_loss, setup_context=_setup, backward=_autograd)
