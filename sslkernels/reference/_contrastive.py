# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops as the dispatcher calls them where no compiled kernel serves, in plain PyTorch.

Signatures are the schemas', `pairs` the six fields of Exclude. Gradients are written out, because autograd does not
record below the dispatcher.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.reference._precision import compute_dtype
from sslkernels.reference.contrastive import (
    Exclude,
    draw,
    l2_normalize,
    logsumexp,
    positives,
    sampled_logsumexp,
    scores,
    similarity_softplus,
    times,
)


def _scale(tensor: Tensor | None, number: float) -> Tensor | float:
    # without a dimension it widens nothing
    return number if tensor is None else tensor.reshape(())


def _row_max(s: Tensor) -> Tensor:
    return s.amax(1) if s.shape[1] else s.new_full((s.shape[0],), -torch.inf)


def _weights(s: Tensor, lse: Tensor, grad: Tensor | None, scales: Sequence[float], dim: int) -> Tensor:
    """d(sum grad * lse)/ds over all scales: grad_i beta exp(beta s_ij - lse_i), zero for a pair left out."""
    total = torch.zeros_like(s)
    if grad is None:
        return total
    for beta, lse_b, grad_b in zip(scales, lse, grad):
        finite = lse_b.masked_fill(lse_b == -torch.inf, 0.0).unsqueeze(dim)
        total = total + beta * grad_b.unsqueeze(dim) * torch.exp(times(s, beta) - finite)
    return total


def _product_gradients(w: Tensor, q: Tensor, k: Tensor, scale: Tensor | float, mask: Sequence[bool]) -> tuple:
    """Gradients of sum_ij w_ij s_ij: dq, dk, dscale; an empty tensor where nobody asked."""
    qc, kc = q.to(w.dtype), k.to(w.dtype)
    wk = w @ kc if mask[0] or mask[2] else w
    none = w.new_empty(0)
    dq = (wk * scale).to(q.dtype) if mask[0] else none
    dk = (w.T @ (qc * scale)).to(k.dtype) if mask[1] else none
    return dq, dk, (qc * wk).sum() if mask[2] else none


def lse_forward(q, k, scale_tensor, scale, *rest):
    *pairs, scales, columns, keep_scores, offset = rest
    scale = _scale(scale_tensor, scale)
    s = scores(q, k, scale, Exclude(*pairs))
    none = s.new_empty(0)
    row = torch.stack([logsumexp(times(s, beta), 1) for beta in scales])
    col = torch.stack([logsumexp(times(s, beta), 0) for beta in scales]) if columns else none
    positive = none if offset is None else positives(q, k, scale, offset)
    return row, col, positive, _row_max(s), s if keep_scores else none


def _positive_gradients(grad, q, k, scale, offset, into):
    """Adds to (dq, dk, dscale), where they are wanted, what comes through positive_i = scale <q_i, k_(i + offset)>."""
    if grad is None:
        return into
    dtype = grad.dtype
    partner = k.roll(-offset, 0)[: q.shape[0]].to(dtype)
    back = torch.zeros(k.shape, dtype=dtype, device=k.device)
    back[: q.shape[0]] = grad[:, None] * q.to(dtype) * scale
    extra = grad[:, None] * partner * scale, back.roll(offset, 0), (grad * (q.to(dtype) * partner).sum(1)).sum()
    return tuple(x if x.numel() == 0 else (x + e).to(x.dtype) for x, e in zip(into, extra))


def lse_backward(grad_row, grad_col, grad_positive, q, k, scale_tensor, scale, *rest):
    *pairs, scales, offset, row_lse, col_lse, _, mask = rest
    scale = _scale(scale_tensor, scale)
    s = scores(q, k, scale, Exclude(*pairs))
    w = _weights(s, row_lse, grad_row, scales, 1) + _weights(s, col_lse, grad_col, scales, 0)
    return _positive_gradients(grad_positive, q, k, scale, offset, _product_gradients(w, q, k, scale, mask))


def self_lse_forward(z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, *rest):
    scales, keep_scores, offset = rest
    pairs = (diagonal, period, groups, groups, key_mask, differ)
    lse, _, positive, top, s = lse_forward(z, z, scale_tensor, scale, *pairs, scales, False, keep_scores, offset)
    if key_mask is not None:
        lse, top = lse.masked_fill(~key_mask, -torch.inf), top.masked_fill(~key_mask, -torch.inf)
        s = s.masked_fill(~key_mask[:, None], -torch.inf) if keep_scores else s
    return lse, positive, top, s


def self_lse_backward(grad, grad_positive, z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, *rest):
    scales, offset, lse, _, mask = rest
    scale = _scale(scale_tensor, scale)
    s = scores(z, z, scale, Exclude(diagonal, period, groups, groups, key_mask, differ))
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None], -torch.inf)
    w = _weights(s, lse, grad, scales, 1)
    wide = z.to(w.dtype)
    dz, dk, dscale = _product_gradients(w, wide, wide, scale, (mask[0], mask[0], mask[1]))
    dz, dk, dscale = _positive_gradients(grad_positive, wide, wide, scale, offset, (dz, dk, dscale))
    return (dz + dk).to(z.dtype), dscale


def attention_forward(q, k, scale_tensor, scale, *pairs):
    s = scores(q, k, _scale(scale_tensor, scale), Exclude(*pairs))
    lse = logsumexp(s, 1)
    w = _weights(s, lse[None], torch.ones_like(lse)[None], (1.0,), 1)
    return lse, _row_max(s), w @ k.to(w.dtype)


def cross_entropy_forward(q, k, positive, weight, uniform_weight, scale_tensor, scale, *rest):
    *pairs, decoupled, mask = rest
    scale = _scale(scale_tensor, scale)
    s = scores(q, k, scale, Exclude(*pairs))
    weight = uniform_weight if weight is None else weight.to(s.dtype)
    lse = logsumexp(s, 1)
    margin = lse - positive.to(s.dtype)
    loss = (weight * (margin if decoupled else F.softplus(margin, threshold=80.0))).sum()
    slope = weight * (torch.ones_like(margin) if decoupled else torch.sigmoid(margin))
    w = _weights(s, lse[None], slope[None], (1.0,), 1)
    dq, dk, dscale = _product_gradients(w, q.to(s.dtype), k.to(s.dtype), scale, (mask[0], mask[1], mask[3]))
    return loss, lse, _row_max(s), dq, dk, -slope if mask[2] else s.new_empty(0), dscale


def two_view_forward(out0, out1, weight, uniform_weight, scale_tensor, scale, decoupled, mask):
    n, eps = out0.shape[0], 1e-12
    z, norm = normalize_forward([out0, out1], eps)
    pairs = (0, n, None, None, False)
    lse, positive, top, none = self_lse_forward(z, scale_tensor, scale, *pairs, (1.0,), False, n)
    lse = lse[0]
    weight = uniform_weight if weight is None else weight.to(lse.dtype)
    margin = lse - positive
    loss = (weight * (margin if decoupled else F.softplus(margin, threshold=80.0))).sum()
    slope = weight * (torch.ones_like(margin) if decoupled else torch.sigmoid(margin))
    wide, wanted = z.to(lse.dtype), (mask[0] or mask[1], mask[2])
    saved = ((1.0,), n, lse[None], none, wanted)
    dz, dscale = self_lse_backward(slope[None], -slope, wide, scale_tensor, scale, *pairs, *saved)
    dx = normalize_backward(dz, wide, norm, eps).view(2, *out0.shape) if wanted[0] else (none, none)
    return loss, lse, positive, top, *(d.clone() if m else none for d, m in zip(dx, mask)), dscale


def softplus_forward(q, k, scale_tensor, scale, bias_tensor, bias, *pairs):
    return similarity_softplus(q, k, _scale(scale_tensor, scale), _scale(bias_tensor, bias), exclude=Exclude(*pairs))


def softplus_backward(grad, q, k, scale_tensor, scale, bias_tensor, bias, *rest):
    *pairs, mask = rest
    scale = _scale(scale_tensor, scale)
    w = grad[:, None] * torch.sigmoid(scores(q, k, scale, Exclude(*pairs)) + _scale(bias_tensor, bias))
    return *_product_gradients(w, q, k, scale, mask), w.sum() if mask[3] else w.new_empty(0)


def softplus_sum_forward(q, k, weight, uniform_weight, *rest):
    *args, mask = rest
    rows = softplus_forward(q, k, *args)
    weight = torch.full_like(rows, uniform_weight) if weight is None else weight.to(rows.dtype)
    return (weight * rows).sum(), *softplus_backward(weight, q.to(rows.dtype), k.to(rows.dtype), *args, mask)


def sampled_forward(q, k, indices, sample_mask, scale_tensor, scale):
    return sampled_logsumexp(q, k, indices, _scale(scale_tensor, scale), mask=sample_mask)


def sampled_backward(grad, q, k, indices, sample_mask, scale_tensor, scale, lse, mask):
    scale = _scale(scale_tensor, scale)
    qc = q.to(lse.dtype)  # (N, D)
    kc, outside = draw(k.to(lse.dtype), indices)  # (N, C, D)
    s = torch.einsum("nd,ncd->nc", qc * scale, kc)
    if sample_mask is not None:
        s = s.masked_fill(~sample_mask, -torch.inf)
    w = _weights(s, lse[None], grad[None], (1.0,), 1)  # (N, C), NaN in a row that drew outside the keys
    wk = torch.einsum("nc,ncd->nd", w, kc)
    none = lse.new_empty(0)
    dk = none
    if mask[1]:
        flat = torch.einsum("nc,nd->ncd", w, qc * scale).flatten(0, 1)
        dk = (
            torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
            .index_add(0, indices.masked_fill(outside, 0).flatten(), flat)
            .to(k.dtype)
        )
    return (wk * scale).to(q.dtype) if mask[0] else none, dk, (qc * wk).sum() if mask[2] else none


def normalize_forward(xs, eps):
    x = torch.cat(list(xs))
    return l2_normalize(xs, eps), torch.linalg.vector_norm(x.to(compute_dtype(x)), dim=1)


def normalize_backward(grad, z, norm, eps):
    g, zc = grad.to(norm.dtype), z.to(norm.dtype)
    along = ((g * zc).sum(1) * (norm > eps))[:, None] * zc
    return ((g - along) / norm.clamp(min=eps)[:, None]).to(z.dtype)
