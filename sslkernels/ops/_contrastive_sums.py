# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake kernels and autograd of the contrastive ops that are sums: softplus rows, one-sweep losses, samples.

A one-sweep op knows its row weights in the forward and emits all gradients there; its backward is a multiplication.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from sslkernels.ops._contrastive import (
    _BIAS,
    _PAIRS,
    _SCALE,
    _asked,
    _asked_scalar,
    _empty,
    _fake_gradients,
)
from sslkernels.ops._emitted import emitted_gradients, save_emitted
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _contrastive as reference
from sslkernels.reference._precision import compute_dtype

# similarity_cross_entropy


def _cross_entropy_fake(q, k, positive, *rest):
    dtype, mask = compute_dtype(q, k), rest[-1]
    row = (q.shape[0],)
    gradients = _fake_gradients(mask, (dtype,) * 4, q, q.shape, k.shape, row, ())
    return _empty(q, (), dtype), _empty(q, row, dtype), _empty(q, row, dtype), *gradients


cross_entropy = define(
    f"similarity_cross_entropy(Tensor q, Tensor k, Tensor positive, Tensor? weight, float uniform_weight, {_SCALE},"
    f" {_PAIRS}, bool decoupled, bool[4] output_mask)"
    " -> (Tensor loss, Tensor row_lse, Tensor row_max, Tensor dq, Tensor dk, Tensor dpositive, Tensor dscale)",
    reference=reference.cross_entropy_forward,
    fake=_cross_entropy_fake,
)


def _cross_entropy_setup(ctx, inputs, output) -> None:
    q, k, positive, _, _, scale_tensor, *_, mask = inputs
    ctx.mark_non_differentiable(*output[1:])
    save_emitted(ctx, (q, k, positive, scale_tensor), mask, output[3:])


def _cross_entropy_autograd(ctx, grad, *unused):
    dq, dk, dpositive, dscale = emitted_gradients(ctx, grad)
    return dq, dk, dpositive, None, None, dscale, *(None,) * 9


differentiable(cross_entropy, setup_context=_cross_entropy_setup, backward=_cross_entropy_autograd)

# two_view_cross_entropy: few arguments and no lists, as what it is for is to cost little beside its work


def _two_view_fake(out0, out1, *rest):
    dtype, mask = compute_dtype(out0), rest[-1]
    rows = (_empty(out0, (2 * out0.shape[0],), dtype) for _ in range(3))
    return _empty(out0, (), dtype), *rows, *_fake_gradients(mask, (dtype,) * 3, out0, out0.shape, out1.shape, ())


two_view = define(
    f"two_view_cross_entropy(Tensor out0, Tensor out1, Tensor? weight, float uniform_weight, {_SCALE}, bool decoupled,"
    " bool[3] output_mask) -> (Tensor loss, Tensor lse, Tensor positive, Tensor row_max, Tensor dout0, Tensor dout1,"
    " Tensor dscale)",
    reference=reference.two_view_forward,
    fake=_two_view_fake,
)


def _two_view_setup(ctx, inputs, output) -> None:
    out0, out1, _, _, scale_tensor, *_, mask = inputs
    ctx.mark_non_differentiable(*output[1:])
    save_emitted(ctx, (out0, out1, scale_tensor), mask, output[4:])


def _two_view_autograd(ctx, grad, *unused):
    dout0, dout1, dscale = emitted_gradients(ctx, grad)
    return dout0, dout1, None, None, dscale, None, None, None


differentiable(two_view, setup_context=_two_view_setup, backward=_two_view_autograd)

# similarity_softplus and its one-sweep sum


softplus = define(
    f"similarity_softplus(Tensor q, Tensor k, {_SCALE}, {_BIAS}, {_PAIRS}) -> Tensor",
    reference=reference.softplus_forward,
    fake=lambda q, k, *rest: _empty(q, (q.shape[0],), compute_dtype(q, k)),
)


def _softplus_backward_fake(grad, q, k, *rest):
    dtypes = (q.dtype, k.dtype, grad.dtype, grad.dtype)
    return _fake_gradients(rest[-1], dtypes, q, q.shape, k.shape, (), ())


softplus_backward = define(
    f"similarity_softplus_backward(Tensor grad, Tensor q, Tensor k, {_SCALE}, {_BIAS}, {_PAIRS}, bool[4] output_mask)"
    " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    reference=reference.softplus_backward,
    fake=_softplus_backward_fake,
)


def _softplus_setup(ctx, inputs, output) -> None:
    q, k, scale_tensor, ctx.scale, bias_tensor, ctx.bias, diagonal, period, *masks, differ = inputs
    ctx.diagonal, ctx.period, ctx.differ = diagonal, period, differ
    ctx.save_for_backward(q, k, scale_tensor, bias_tensor, *masks)


def _softplus_autograd(ctx, grad):
    if grad is None:
        return (None,) * 12
    q, k, scale_tensor, bias_tensor, *masks = ctx.saved_tensors
    mask = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    pairs = (ctx.diagonal, ctx.period, *masks, ctx.differ)
    dq, dk, dscale, dbias = softplus_backward(grad, q, k, scale_tensor, ctx.scale, bias_tensor, ctx.bias, *pairs, mask)
    return (
        *(_asked(dq, mask[0]), _asked(dk, mask[1]), _asked_scalar(dscale, scale_tensor, mask[2]), None),
        *(_asked_scalar(dbias, bias_tensor, mask[3]), *(None,) * 7),
    )


differentiable(softplus, setup_context=_softplus_setup, backward=_softplus_autograd)
once_differentiable(softplus_backward)


def _softplus_sum_fake(q, k, *rest):
    dtype = compute_dtype(q, k)
    return _empty(q, (), dtype), *_fake_gradients(rest[-1], (dtype,) * 4, q, q.shape, k.shape, (), ())


softplus_sum = define(
    f"similarity_softplus_sum(Tensor q, Tensor k, Tensor? weight, float uniform_weight, {_SCALE}, {_BIAS}, {_PAIRS},"
    " bool[4] output_mask) -> (Tensor loss, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    reference=reference.softplus_sum_forward,
    fake=_softplus_sum_fake,
)


def _softplus_sum_setup(ctx, inputs, output) -> None:
    q, k, _, _, scale_tensor, _, bias_tensor, *_, mask = inputs
    ctx.mark_non_differentiable(*output[1:])
    save_emitted(ctx, (q, k, scale_tensor, bias_tensor), mask, output[1:])


def _softplus_sum_autograd(ctx, grad, *unused):
    dq, dk, dscale, dbias = emitted_gradients(ctx, grad)
    return dq, dk, None, None, dscale, None, dbias, *(None,) * 8


differentiable(softplus_sum, setup_context=_softplus_sum_setup, backward=_softplus_sum_autograd)

# sampled_logsumexp


sampled = define(
    f"sampled_logsumexp(Tensor q, Tensor k, Tensor indices, Tensor? mask, {_SCALE}) -> Tensor",
    reference=reference.sampled_forward,
    fake=lambda q, k, *rest: _empty(q, (q.shape[0],), compute_dtype(q, k)),
)
sampled_backward = define(
    f"sampled_logsumexp_backward(Tensor grad, Tensor q, Tensor k, Tensor indices, Tensor? mask, {_SCALE}, Tensor lse,"
    " bool[3] output_mask) -> (Tensor dq, Tensor dk, Tensor dscale)",
    reference=reference.sampled_backward,
    fake=lambda grad, q, k, *rest: _fake_gradients(rest[-1], (q.dtype, k.dtype, grad.dtype), q, q.shape, k.shape, ()),
)


def _sampled_setup(ctx, inputs, output) -> None:
    q, k, indices, sample_mask, scale_tensor, ctx.scale = inputs
    ctx.save_for_backward(q, k, indices, sample_mask, scale_tensor, output)


def _sampled_autograd(ctx, grad):
    if grad is None:
        return (None,) * 6
    q, k, indices, sample_mask, scale_tensor, lse = ctx.saved_tensors
    mask = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    dq, dk, dscale = sampled_backward(grad, q, k, indices, sample_mask, scale_tensor, ctx.scale, lse, mask)
    grads = _asked(dq, mask[0]), _asked(dk, mask[1]), None, None, _asked_scalar(dscale, scale_tensor, mask[2])
    return *grads, None


differentiable(sampled, setup_context=_sampled_setup, backward=_sampled_autograd)
once_differentiable(sampled_backward)
