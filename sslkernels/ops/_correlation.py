# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake kernels and autograd formulas of the correlation ops; `correlation.py` has what people call.

The three scalars know the weights of their gradients, so the forward emits these; `output_mask` says which are wanted.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from sslkernels.ops._emitted import emitted_gradients, save_emitted
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _correlation as reference
from sslkernels.reference._precision import compute_dtype

# standardize

standard = define(
    "standardize(Tensor x, float eps, bool unbiased) -> (Tensor z, Tensor moments)",
    reference=reference.standardize_forward,
    fake=lambda x, *rest: (x.new_empty(x.shape), x.new_empty((3, x.shape[1]), dtype=compute_dtype(x))),
)
standard_backward = define(
    "standardize_backward(Tensor grad, Tensor x, Tensor moments, bool unbiased) -> Tensor",
    reference=reference.standardize_backward,
    fake=lambda grad, x, *rest: x.new_empty(x.shape),
)


def _standard_setup(ctx, inputs, output) -> None:
    x, _, ctx.unbiased = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _standard_autograd(ctx, grad, unused):
    return None if grad is None else standard_backward(grad, *ctx.saved_tensors, ctx.unbiased), None, None


differentiable(standard, setup_context=_standard_setup, backward=_standard_autograd)
once_differentiable(standard_backward)

# the scalars


def scalar(schema: str, function, everywhere: bool = False):
    """A scalar of two views, the last argument its `output_mask`, and its emitted gradients."""

    def fake(x, y, *rest):
        dtype = compute_dtype(x, x if y is None else y)
        grads = (x.new_empty(view.shape if w else (0,), dtype=dtype) for view, w in zip((x, y), rest[-1]))
        return x.new_empty((), dtype=dtype), *grads

    def setup(ctx, inputs, output) -> None:
        ctx.others = len(inputs) - 2
        ctx.mark_non_differentiable(*output[1:])
        save_emitted(ctx, inputs[:2], inputs[-1], output[1:])

    def autograd(ctx, grad, *unused):
        return *emitted_gradients(ctx, grad), *(None,) * ctx.others

    op = define(
        f"{schema}, bool[2] output_mask) -> (Tensor value, Tensor dx, Tensor dy)",
        reference=function,
        fake=fake,
        everywhere=everywhere,
    )
    differentiable(op, setup_context=setup, backward=autograd)
    return op


frobenius = scalar("product_frobenius(Tensor a, Tensor? b, bool off_diagonal", reference.product_frobenius)
correlation = scalar(
    "two_view_correlation(Tensor x, Tensor y, float lambda_param, float eps", reference.two_view_correlation
)
covariance = scalar(
    "two_view_covariance(Tensor x, Tensor y, float[3] weights, float gamma, float eps", reference.two_view_covariance
)
