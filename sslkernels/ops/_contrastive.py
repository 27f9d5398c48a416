# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake kernels and autograd formulas of the contrastive ops; `contrastive.py` has what people call.

Every op takes the six fields of `Exclude` in their order, and scale (or bias) as a tensor or a number: a learnable one
travels as a tensor, and no tensor is made of a number. `output_mask` says which gradients anyone needs; the others come
back as empty tensors.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _contrastive as reference
from sslkernels.reference._precision import compute_dtype

_SCALE = "Tensor? scale_tensor, float scale"
_BIAS = "Tensor? bias_tensor, float bias"
_PAIRS = "SymInt? diagonal, SymInt? period, Tensor? query_groups, Tensor? key_groups, Tensor? key_mask, bool differ"
_SELF_PAIRS = "SymInt? diagonal, SymInt? period, Tensor? groups, Tensor? key_mask, bool differ"


def _empty(like: Tensor, shape: Any, dtype: torch.dtype, when: bool = True) -> Tensor:
    return like.new_empty(tuple(shape) if when else (0,), dtype=dtype)


def _fake_gradients(mask, dtypes, like, *shapes) -> tuple[Tensor, ...]:
    return tuple(_empty(like, shape, dtype, when) for when, dtype, shape in zip(mask, dtypes, shapes))


def _asked(grad: Tensor, wanted: bool) -> Tensor | None:
    return grad if wanted else None


def _asked_scalar(grad: Tensor, scalar: Tensor | None, wanted: bool) -> Tensor | None:
    return grad.to(scalar.dtype).reshape(scalar.shape) if wanted and scalar is not None else None


# similarity_logsumexp


def _lse_fake(q, k, scale_tensor, scale, *rest):
    *_, scales, columns, keep_scores, offset = rest
    n, m, dtype = q.shape[0], k.shape[0], compute_dtype(q, k)
    return (
        _empty(q, (len(scales), n), dtype),
        _empty(q, (len(scales), m), dtype, columns),
        _empty(q, (n,), dtype, offset is not None),
        _empty(q, (n,), dtype),
        _empty(q, (n, m), dtype, keep_scores),
    )


def _lse_backward_fake(grad_row, grad_col, grad_positive, q, k, *rest):
    dtypes = (q.dtype, k.dtype, compute_dtype(q, k))
    return _fake_gradients(rest[-1], dtypes, q, q.shape, k.shape, ())


lse = define(
    f"similarity_logsumexp(Tensor q, Tensor k, {_SCALE}, {_PAIRS}, float[] scales, bool columns, bool keep_scores,"
    " SymInt? offset) -> (Tensor row_lse, Tensor col_lse, Tensor positive, Tensor row_max, Tensor scores)",
    reference=reference.lse_forward,
    fake=_lse_fake,
)
lse_backward = define(
    f"similarity_logsumexp_backward(Tensor? grad_row, Tensor? grad_col, Tensor? grad_positive, Tensor q, Tensor k,"
    f" {_SCALE}, {_PAIRS}, float[] scales, SymInt? offset, Tensor row_lse, Tensor col_lse, Tensor scores,"
    " bool[3] output_mask) -> (Tensor dq, Tensor dk, Tensor dscale)",
    reference=reference.lse_backward,
    fake=_lse_backward_fake,
)


def _lse_setup(ctx, inputs, output) -> None:
    q, k, scale_tensor, ctx.scale, diagonal, period, query_groups, key_groups, key_mask, differ, scales, *_ = inputs
    row, col, positive, top, scores = output
    # what nobody asked for is empty: a gradient of it, however empty, must not reach the kernel
    absent = [x for x, asked in ((col, inputs[-3]), (positive, inputs[-1] is not None)) if not asked]
    ctx.mark_non_differentiable(top, scores, *absent)
    ctx.save_for_backward(q, k, scale_tensor, query_groups, key_groups, key_mask, row, col, scores)
    ctx.diagonal, ctx.period, ctx.differ, ctx.scales, ctx.offset = diagonal, period, differ, scales, inputs[-1]


def _lse_autograd(ctx, grad_row, grad_col, grad_positive, grad_top, grad_scores):
    if grad_row is None and grad_col is None and grad_positive is None:
        return (None,) * 14
    q, k, scale_tensor, query_groups, key_groups, key_mask, row, col, scores = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:3])
    pairs = (ctx.diagonal, ctx.period, query_groups, key_groups, key_mask, ctx.differ)
    grads = (grad_row, grad_col, grad_positive)
    saved = (row, col, scores, mask)
    dq, dk, dscale = lse_backward(*grads, q, k, scale_tensor, ctx.scale, *pairs, ctx.scales, ctx.offset, *saved)
    return _asked(dq, mask[0]), _asked(dk, mask[1]), _asked_scalar(dscale, scale_tensor, mask[2]), *(None,) * 11


differentiable(lse, setup_context=_lse_setup, backward=_lse_autograd)
once_differentiable(lse_backward)

# self_similarity_logsumexp


def _self_lse_fake(z, scale_tensor, scale, *rest):
    *_, scales, keep_scores, offset = rest
    m, dtype = z.shape[0], compute_dtype(z)
    return (
        _empty(z, (len(scales), m), dtype),
        _empty(z, (m,), dtype, offset is not None),
        _empty(z, (m,), dtype),
        _empty(z, (m, m), dtype, keep_scores),
    )


def _self_lse_backward_fake(grad, grad_positive, z, *rest):
    return _fake_gradients(rest[-1], (z.dtype, compute_dtype(z)), z, z.shape, ())


self_lse = define(
    f"self_similarity_logsumexp(Tensor z, {_SCALE}, {_SELF_PAIRS}, float[] scales, bool keep_scores, SymInt? offset)"
    " -> (Tensor lse, Tensor positive, Tensor row_max, Tensor scores)",
    reference=reference.self_lse_forward,
    fake=_self_lse_fake,
)
self_lse_backward = define(
    f"self_similarity_logsumexp_backward(Tensor? grad, Tensor? grad_positive, Tensor z, {_SCALE}, {_SELF_PAIRS},"
    " float[] scales, SymInt? offset, Tensor lse, Tensor scores, bool[2] output_mask) -> (Tensor dz, Tensor dscale)",
    reference=reference.self_lse_backward,
    fake=_self_lse_backward_fake,
)


def _self_lse_setup(ctx, inputs, output) -> None:
    z, scale_tensor, ctx.scale, ctx.diagonal, ctx.period, groups, key_mask, ctx.differ, ctx.scales, _, offset = inputs
    ctx.offset = offset
    ctx.mark_non_differentiable(*output[2 if offset is not None else 1 :])
    ctx.save_for_backward(z, scale_tensor, groups, key_mask, output[0], output[3])


def _self_lse_autograd(ctx, grad, grad_positive, grad_top, grad_scores):
    if grad is None and grad_positive is None:
        return (None,) * 11
    z, scale_tensor, groups, key_mask, lse_, scores = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    pairs = (ctx.diagonal, ctx.period, groups, key_mask, ctx.differ)
    saved = (lse_, scores, mask)
    dz, dscale = self_lse_backward(
        grad, grad_positive, z, scale_tensor, ctx.scale, *pairs, ctx.scales, ctx.offset, *saved
    )
    return _asked(dz, mask[0]), _asked_scalar(dscale, scale_tensor, mask[1]), *(None,) * 9


differentiable(self_lse, setup_context=_self_lse_setup, backward=_self_lse_autograd)
once_differentiable(self_lse_backward)

# l2_normalize


normalize = define(
    "l2_normalize(Tensor[] xs, float eps) -> (Tensor z, Tensor norm)",
    reference=reference.normalize_forward,
    fake=lambda xs, eps: (
        _empty(xs[0], (sum(x.shape[0] for x in xs), xs[0].shape[1]), xs[0].dtype),
        _empty(xs[0], (sum(x.shape[0] for x in xs),), compute_dtype(xs[0])),
    ),
)
normalize_backward = define(
    "l2_normalize_backward(Tensor grad, Tensor z, Tensor norm, float eps) -> Tensor",
    reference=reference.normalize_backward,
    fake=lambda grad, z, norm, eps: torch.empty_like(z),
)


def _normalize_setup(ctx, inputs, output) -> None:
    xs, ctx.eps = inputs
    ctx.rows = [x.shape[0] for x in xs]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _normalize_autograd(ctx, grad, grad_norm):
    if grad is None:
        return [None] * len(ctx.rows), None
    dx = normalize_backward(grad, *ctx.saved_tensors, ctx.eps)
    return list(dx.split(ctx.rows)), None


differentiable(normalize, setup_context=_normalize_setup, backward=_normalize_autograd)
once_differentiable(normalize_backward)

# similarity_row_attention: only rows wanted, keys frozen; the softmax-weighted sum of keys is dq up to a factor, so it
# is emitted by the forward sweep and the keys are not saved: a queue may be overwritten before backward.


def _attention_fake(q, k, *rest):
    dtype = compute_dtype(q, k)
    return _empty(q, (q.shape[0],), dtype), _empty(q, (q.shape[0],), dtype), _empty(q, q.shape, dtype)


attention = define(
    f"similarity_row_attention(Tensor q, Tensor k, {_SCALE}, {_PAIRS})"
    " -> (Tensor row_lse, Tensor row_max, Tensor context)",
    reference=reference.attention_forward,
    fake=_attention_fake,
)


def _attention_gradients(grad, q, context, scale_tensor, scale, mask):
    factor = grad * (scale if scale_tensor is None else scale_tensor.reshape(()))
    dq = (factor[:, None] * context).to(q.dtype) if mask[0] else grad.new_empty(0)
    return dq, torch.einsum("n,nd,nd->", grad, q.to(grad.dtype), context) if mask[1] else grad.new_empty(0)


attention_backward = define(
    f"similarity_row_attention_backward(Tensor grad, Tensor q, Tensor context, {_SCALE}, bool[2] output_mask)"
    " -> (Tensor dq, Tensor dscale)",
    reference=_attention_gradients,
    fake=lambda grad, q, *rest: _fake_gradients(rest[-1], (q.dtype, grad.dtype), q, q.shape, ()),
    everywhere=True,
)


def _attention_setup(ctx, inputs, output) -> None:
    q, _, scale_tensor, ctx.scale, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, output[2], scale_tensor)


def _attention_autograd(ctx, grad, grad_top, grad_context):
    if grad is None:
        return (None,) * 10
    q, context, scale_tensor = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    dq, dscale = attention_backward(grad, q, context, scale_tensor, ctx.scale, mask)
    return _asked(dq, mask[0]), None, _asked_scalar(dscale, scale_tensor, mask[1]), *(None,) * 7


differentiable(attention, setup_context=_attention_setup, backward=_attention_autograd)
once_differentiable(attention_backward)
