# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake kernels and autograd formulas of soft cross-entropy; `_distillation_soft.py` has what people call.

Students and teachers are lists of (B, V) and (S_i, B, V), whose views count in order; center is (1, V) or (T, V). The
emitted gradients have their student's dtype and must be multiplied by `scale`, which is 1 but for float16.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.ops._distillation_views import count
from sslkernels.ops._emitted import is_one, scaled_by
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _distillation_soft as reference
from sslkernels.reference._precision import compute_dtype

_OPERANDS = "Tensor[] teacher, Tensor? center, Tensor? row_weight, float student_temp, float teacher_temp, bool exclude"

# the sum or mean over rows: the weight of every row is known, so the forward emits the gradient. The last of `wanted`
# is the teacher's mean, the others are the students' gradients.


def _scalars(student, teacher, wanted) -> list[Tensor]:
    dtype, width = compute_dtype(*student, *teacher), teacher[0].shape[-1]
    return [student[0].new_empty(shape, dtype=dtype) for shape in ((), (width if wanted[-1] else 0,), ())]


def _gradients(student, wanted) -> list[Tensor]:
    return [x.new_empty(x.shape if w else (0,)) for x, w in zip(student, wanted)]


total = define(
    f"soft_cross_entropy(Tensor[] student, {_OPERANDS}, bool mean, bool[] wanted) -> Tensor[]",
    reference=reference.forward,
    fake=lambda student, teacher, *rest: [*_scalars(student, teacher, rest[-1]), *_gradients(student, rest[-1])],
)
_total_in_place = define(
    f"soft_cross_entropy_(Tensor(a!)[] student, {_OPERANDS}, bool mean, bool[] wanted)"
    " -> (Tensor loss, Tensor mean, Tensor scale)",
    reference=reference.forward_,
    fake=lambda student, teacher, *rest: tuple(_scalars(student, teacher, rest[-1])),
)


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.wanted, ctx.teachers = inputs[-1][:-1], len(inputs[1])
    ctx.save_for_backward(output[2], *(g for g, w in zip(output[3:], ctx.wanted) if w))


def _autograd(ctx, grad, *unused):
    constants = ([None] * ctx.teachers, *(None,) * 7)
    if grad is None:
        return [None] * len(ctx.wanted), *constants
    scale, *emitted = ctx.saved_tensors
    if emitted[0].dtype == torch.float16:
        grad = grad * scale
    scaled = iter(scaled_by(grad, emitted, emitted))
    return [next(scaled) if w else None for w in ctx.wanted], *constants


differentiable(total, setup_context=_setup, backward=_autograd)


class _InPlace(torch.autograd.Function):
    """The loss whose gradient takes the memory of the logits: an op that mutates cannot have an autograd formula."""

    @staticmethod
    def forward(ctx, rest, *student):
        written = [x.detach() for x in student]
        loss, mean, scale = _total_in_place(written, *rest)
        wanted = rest[-1]
        # so that autograd notices whoever has saved the logits for its backward
        torch.autograd.graph.increment_version([x for x, w in zip(student, wanted) if w])
        ctx.mark_non_differentiable(mean)
        ctx.wanted, ctx.spent = wanted[:-1], False
        ctx.save_for_backward(scale, *(x for x, w in zip(student, wanted) if w))
        return loss, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, unused):
        if ctx.spent:
            raise RuntimeError("soft_cross_entropy(inplace=True): the gradient was given away by the first backward")
        ctx.spent = True
        scale, *emitted = (x.detach() for x in ctx.saved_tensors)
        if emitted[0].dtype == torch.float16:
            grad = grad * scale
        if not is_one(grad):
            factor = grad.reshape(1)  # one dimension, so that a 16-bit gradient is scaled in float32
            emitted = [x.mul_(factor) for x in emitted]
        out = iter(emitted)
        return None, *(next(out) if w else None for w in ctx.wanted)


def total_in_place(student, *rest):
    return _InPlace.apply(rest, *student)


# row by row

rows = define(
    f"soft_cross_entropy_rows(Tensor[] student, {_OPERANDS}, bool mean) -> Tensor[]",
    reference=reference.rows_forward,
    fake=lambda student, teacher, *rest: _fake_rows(student, teacher, rest[-1]),
)
rows_backward = define(
    f"soft_cross_entropy_rows_backward(Tensor grad, Tensor[] student, {_OPERANDS}, bool[] wanted) -> Tensor[]",
    reference=reference.rows_backward,
    fake=lambda grad, student, teacher, *rest: _gradients(student, rest[-1]),
)


def _fake_rows(student, teacher, need_mean) -> list[Tensor]:
    dtype, (batch, width) = compute_dtype(*student, *teacher), student[0].shape[-2:]
    shapes = ((count(student), batch), (width if need_mean else 0,))
    return [student[0].new_empty(shape, dtype=dtype) for shape in shapes]


def _rows_setup(ctx, inputs, output) -> None:
    student, teacher, center, row_weight, *ctx.options, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.count = len(student)
    ctx.save_for_backward(*student, *teacher, center, row_weight)


def _rows_autograd(ctx, grad, unused):
    wanted = ctx.needs_input_grad[0]
    *views, center, row_weight = ctx.saved_tensors
    constants = ([None] * len(views[ctx.count :]), *(None,) * 6)
    if grad is None:
        return [None] * ctx.count, *constants
    operands = (views[: ctx.count], views[ctx.count :], center, row_weight, *ctx.options)
    out = rows_backward(grad, *operands, list(wanted))
    return [g if w else None for g, w in zip(out, wanted)], *constants


differentiable(rows, setup_context=_rows_setup, backward=_rows_autograd)
once_differentiable(rows_backward)

# the teacher alone

softmax_center = define(
    "softmax_center(Tensor logits, Tensor? center, float temperature) -> (Tensor probabilities, Tensor mean)",
    reference=reference.softmax_center,
    fake=lambda x, *rest: (
        x.new_empty(x.shape, dtype=compute_dtype(x)),
        x.new_empty(x.shape[-1:], dtype=compute_dtype(x)),
    ),
)
once_differentiable(softmax_center)
