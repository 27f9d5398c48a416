# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake kernels and autograd formulas of the regression ops; `regression.py` has what people call.

`index` names the rows: int64 ids into the target, a bool mask over the rows of both, or None for all.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch

from sslkernels.ops._emitted import emitted_gradients, save_emitted
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _regression as reference
from sslkernels.reference._precision import compute_dtype

_OPERANDS = "Tensor pred, Tensor target, Tensor? index, str loss, float beta, bool normalize_target, float eps"

# the sum or mean over rows: the weight of every row is known, so the forward emits the gradient


def _fake(pred, target, *rest):
    dtype = compute_dtype(pred, target)
    return pred.new_empty((), dtype=dtype), pred.new_empty(pred.shape if rest[-1] else (0,), dtype=dtype)


total = define(
    f"masked_regression({_OPERANDS}, float scale, bool mean, bool need_gradient) -> (Tensor loss, Tensor dpred)",
    reference=reference.forward,
    fake=_fake,
)


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    save_emitted(ctx, inputs[:1], inputs[-1:], output[1:])


def _autograd(ctx, grad, unused):
    return *emitted_gradients(ctx, grad), *(None,) * 9


differentiable(total, setup_context=_setup, backward=_autograd)

# row by row

rows = define(
    f"masked_regression_rows({_OPERANDS}) -> Tensor",
    reference=reference.rows_forward,
    fake=lambda pred, target, *rest: pred.new_empty(pred.shape[:-1], dtype=compute_dtype(pred, target)),
)
rows_backward = define(
    f"masked_regression_rows_backward(Tensor grad, {_OPERANDS}) -> Tensor",
    reference=reference.rows_backward,
    fake=lambda grad, pred, *rest: pred.new_empty(pred.shape),
)


def _rows_setup(ctx, inputs, output) -> None:
    pred, target, index, *ctx.options = inputs
    ctx.save_for_backward(pred, target, index)


def _rows_autograd(ctx, grad):
    if grad is None:
        return (None,) * 7
    return rows_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 6


differentiable(rows, setup_context=_rows_setup, backward=_rows_autograd)
once_differentiable(rows_backward)

average = define(
    "average_layers(Tensor[] layers, bool instance_norm, bool layer_norm, float eps) -> Tensor",
    reference=reference.average_forward,
    fake=lambda layers, *rest: torch.empty(layers[0].shape, dtype=compute_dtype(*layers), device=layers[0].device),
)
once_differentiable(average)
