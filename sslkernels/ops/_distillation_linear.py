# SPDX-License-Identifier: Apache-2.0
"""Soft cross-entropy of logits that a prototype layer makes; `distillation.py` gathers the family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslkernels import _checks as check
from sslkernels._autocast import cast_features
from sslkernels.ops import _distillation_views as views
from sslkernels.ops._distillation_views import Views
from sslkernels.ops._emitted import emitted_gradients, save_emitted, wants_grad
from sslkernels.ops._registry import define, differentiable
from sslkernels.reference import _distillation_linear as reference
from sslkernels.reference._precision import compute_dtype

__all__ = ["linear_soft_cross_entropy"]

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
    temperatures = views.temperatures(student_temp=student_temp, teacher_temp=teacher_temp)
    students, teachers, rows_only = views.two_sides(student, teacher, "D")
    exclude = views.excluding(exclude_same_view, rows_only, students, teachers)
    # hidden rows are small, so that a list of views is put together
    s, t = reference.stack_views(students), reference.stack_views(teachers)
    _check_layers(s, weight, t, teacher_weight)
    center = views.centers(center, weight.shape[0], weight, len(t))
    row_weight = views.sample_weights(row_weight, s)
    s, weight, t = cast_features(s, weight, t.detach())
    if teacher_weight is not None:
        (teacher_weight,) = cast_features(teacher_weight.detach())
    layers = (s, weight, t, teacher_weight, center, row_weight)
    options = (exclude, reduction == "mean", return_center, PANEL_BYTES, wants_grad(s, weight))
    loss, mean, *_ = _loss(*layers, *temperatures, *options)
    return (loss, mean) if return_center else loss


def _check_layers(s: Tensor, weight: Any, t: Tensor, teacher_weight: Any) -> None:
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
