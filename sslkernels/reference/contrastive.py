# SPDX-License-Identifier: Apache-2.0
"""The contrastive primitives in plain differentiable PyTorch: slow, quadratic in memory, and the definition.

Any device, any floating dtype. Arithmetic is float64 for float64 input and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Exclude(NamedTuple):
    """Which pairs (i, j) a sweep leaves out: those that any of the given rules names.

    diagonal:      j == i + diagonal, or j congruent to i + diagonal modulo `period` where that is given.
    period:        needs `diagonal`.
    query_groups:  (N,) int64, with key_groups (M,) int64: pairs of equal groups; of different groups with `differ`.
    key_mask:      (M,) bool: keys where it is False.
    """

    diagonal: int | None = None
    period: int | None = None
    query_groups: Tensor | None = None
    key_groups: Tensor | None = None
    key_mask: Tensor | None = None
    differ: bool = False


NOTHING = Exclude()


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def excluded_pairs(n: int, m: int, device: torch.device, exclude: Exclude) -> Tensor:
    """(N, M) bool, True where a pair is left out."""
    out = torch.zeros(n, m, dtype=torch.bool, device=device)
    if exclude.diagonal is not None:
        offset = torch.arange(m, device=device) - torch.arange(n, device=device)[:, None] - exclude.diagonal
        out |= (offset if exclude.period is None else offset % exclude.period) == 0
    if exclude.query_groups is not None and exclude.key_groups is not None:
        out |= (exclude.query_groups[:, None] == exclude.key_groups) != exclude.differ
    if exclude.key_mask is not None:
        out |= ~exclude.key_mask
    return out


def scores(q: Tensor, k: Tensor, scale: Tensor | float, exclude: Exclude = NOTHING) -> Tensor:
    """s_ij = scale * <q_i, k_j>, -inf where the pair is left out. (N, M)"""
    dtype = compute_dtype(q, k)
    s = (q.to(dtype) * scale) @ k.to(dtype).T
    return s.masked_fill(excluded_pairs(s.shape[0], s.shape[1], s.device, exclude), -torch.inf)


def logsumexp(s: Tensor, dim: int) -> Tensor:
    """torch.logsumexp with -inf and no gradient (instead of NaN) for a slice without a pair."""
    empty = (s == -torch.inf).all(dim)
    return torch.logsumexp(s.masked_fill(empty.unsqueeze(dim), 0.0), dim).masked_fill(empty, -torch.inf)


def l2_normalize(xs: Sequence[Tensor], eps: float = 1e-12) -> Tensor:
    """Rows divided by max(norm, eps), one tensor below the other; 16-bit rows are rounded once."""
    x = torch.cat(list(xs))
    return F.normalize(x.to(compute_dtype(x)), dim=1, eps=eps).to(x.dtype)


def positives(q: Tensor, k: Tensor, scale: Tensor | float, offset: int) -> Tensor:
    """positive_i = s_ij with j = i + offset modulo M. (N,)"""
    partner = k.roll(-offset, 0)[: q.shape[0]]
    return (q.to(compute_dtype(q, k)) * partner).sum(1) * scale


def similarity_logsumexp(
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    *,
    exclude: Exclude = NOTHING,
    scales: Sequence[float] | None = None,
    columns: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """row_lse_i = log sum_j exp(s_ij), col_lse_j = log sum_i exp(s_ij); with `scales`, one row for each multiplier."""
    s = scores(q, k, scale, exclude)
    rows = [logsumexp(_times(s, beta), 1) for beta in scales or (1.0,)]
    cols = [logsumexp(_times(s, beta), 0) for beta in scales or (1.0,)] if columns else None
    if scales is None:
        return rows[0], cols[0] if cols else None
    return torch.stack(rows), torch.stack(cols) if cols else None


def self_similarity_logsumexp(
    z: Tensor, scale: Tensor | float = 1.0, *, exclude: Exclude = NOTHING, scales: Sequence[float] | None = None
) -> Tensor:
    """lse_i = log sum_j exp(scale <z_i, z_j>) over the pairs left in; a masked row is left out as key and as query."""
    lse = similarity_logsumexp(z, z, scale, exclude=symmetric(exclude), scales=scales, columns=False)[0]
    return lse if exclude.key_mask is None else lse.masked_fill(~exclude.key_mask, -torch.inf)


def symmetric(exclude: Exclude) -> Exclude:
    """The rules of a self-similarity: groups on both sides."""
    return exclude._replace(key_groups=exclude.query_groups)


def similarity_softplus(
    q: Tensor, k: Tensor, scale: Tensor | float, bias: Tensor | float = 0.0, *, exclude: Exclude = NOTHING
) -> Tensor:
    """row_i = sum_j softplus(s_ij + bias). (N,)"""
    return F.softplus(scores(q, k, scale, exclude) + bias, threshold=80.0).sum(1)


def similarity_cross_entropy(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    scale: Tensor | float = 1.0,
    *,
    weight: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
    decoupled: bool = False,
) -> Tensor:
    """sum_i weight_i softplus(row_lse_i - positive_i), or without the softplus if `decoupled`."""
    margin = logsumexp(scores(q, k, scale, exclude), 1) - positive
    return (weight * (margin if decoupled else F.softplus(margin, threshold=80.0))).sum()


def sampled_logsumexp(
    q: Tensor, k: Tensor, indices: Tensor, scale: Tensor | float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """lse_i = log sum_c exp(scale <q_i, k_indices[i, c]>) over the samples where mask[i, c] is True. (N,)

    An index outside the keys reads nothing and makes its row NaN.
    """
    dtype = compute_dtype(q, k)
    drawn, outside = _draw(k.to(dtype), indices)
    s = torch.einsum("nd,ncd->nc", q.to(dtype) * scale, drawn)  # (N, C)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return logsumexp(s.masked_fill(outside, torch.nan), 1)


def _draw(k: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, D) the keys drawn, and (N, C) where the index is none of theirs."""
    outside = (indices < 0) | (indices >= k.shape[0])
    return k[indices.masked_fill(outside, 0)], outside


def _times(s: Tensor, beta: float) -> Tensor:
    # 0 * -inf is NaN, but a pair left out stays left out at every scale
    return s if beta == 1.0 else torch.where(s == -torch.inf, s, s * beta)


# What the dispatcher calls where no compiled kernel serves: the ops' own signatures, gradients written out, because
# autograd does not record below the dispatcher. `pairs` are the six fields of Exclude.


def _scale(tensor: Tensor | None, number: float) -> Tensor | float:
    return number if tensor is None else tensor


def _row_max(s: Tensor) -> Tensor:
    return s.amax(1) if s.shape[1] else s.new_full((s.shape[0],), -torch.inf)


def _weights(s: Tensor, lse: Tensor, grad: Tensor | None, scales: Sequence[float], dim: int) -> Tensor:
    """d(sum grad * lse)/ds over all scales: grad_i beta exp(beta s_ij - lse_i), zero for a pair left out."""
    total = torch.zeros_like(s)
    if grad is None:
        return total
    for beta, lse_b, grad_b in zip(scales, lse, grad):
        finite = lse_b.masked_fill(lse_b == -torch.inf, 0.0).unsqueeze(dim)
        total = total + beta * grad_b.unsqueeze(dim) * torch.exp(_times(s, beta) - finite)
    return total


def _product_gradients(w: Tensor, q: Tensor, k: Tensor, scale: Tensor | float, mask: Sequence[bool]) -> tuple:
    """Gradients of sum_ij w_ij s_ij: dq, dk, dscale; an empty tensor where nobody asked."""
    qc, kc = q.to(w.dtype), k.to(w.dtype)
    wk = w @ kc if mask[0] or mask[2] else w
    none = w.new_empty(0)
    dq = (wk * scale).to(q.dtype) if mask[0] else none
    dk = (w.T @ (qc * scale)).to(k.dtype) if mask[1] else none
    return dq, dk, (qc * wk).sum() if mask[2] else none


def lse_forward(q, k, scale_tensor, scale, *rest):  # type: ignore[no-untyped-def]
    *pairs, scales, columns, keep_scores, offset = rest
    scale = _scale(scale_tensor, scale)
    s = scores(q, k, scale, Exclude(*pairs))
    none = s.new_empty(0)
    row = torch.stack([logsumexp(_times(s, beta), 1) for beta in scales])
    col = torch.stack([logsumexp(_times(s, beta), 0) for beta in scales]) if columns else none
    positive = none if offset is None else positives(q, k, scale, offset)
    return row, col, positive, _row_max(s), s if keep_scores else none


def _positive_gradients(grad, q, k, scale, offset, into):  # type: ignore[no-untyped-def]
    """Adds to (dq, dk, dscale), where they are wanted, what comes through positive_i = scale <q_i, k_(i + offset)>."""
    if grad is None:
        return into
    dtype = grad.dtype
    partner = k.roll(-offset, 0)[: q.shape[0]].to(dtype)
    back = torch.zeros(k.shape, dtype=dtype, device=k.device)
    back[: q.shape[0]] = grad[:, None] * q.to(dtype) * scale
    extra = grad[:, None] * partner * scale, back.roll(offset, 0), (grad * (q.to(dtype) * partner).sum(1)).sum()
    return tuple(x if x.numel() == 0 else (x + e).to(x.dtype) for x, e in zip(into, extra))


def lse_backward(grad_row, grad_col, grad_positive, q, k, scale_tensor, scale, *rest):  # type: ignore[no-untyped-def]
    *pairs, scales, offset, row_lse, col_lse, _, mask = rest
    scale = _scale(scale_tensor, scale)
    s = scores(q, k, scale, Exclude(*pairs))
    w = _weights(s, row_lse, grad_row, scales, 1) + _weights(s, col_lse, grad_col, scales, 0)
    return _positive_gradients(grad_positive, q, k, scale, offset, _product_gradients(w, q, k, scale, mask))


def self_lse_forward(z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, *rest):  # type: ignore[no-untyped-def]
    scales, keep_scores, offset = rest
    pairs = (diagonal, period, groups, groups, key_mask, differ)
    lse, _, positive, top, s = lse_forward(z, z, scale_tensor, scale, *pairs, scales, False, keep_scores, offset)
    if key_mask is not None:
        lse, top = lse.masked_fill(~key_mask, -torch.inf), top.masked_fill(~key_mask, -torch.inf)
        s = s.masked_fill(~key_mask[:, None], -torch.inf) if keep_scores else s
    return lse, positive, top, s


def self_lse_backward(grad, grad_positive, z, scale_tensor, scale, diagonal, period, groups, key_mask, differ, *rest):  # type: ignore[no-untyped-def]
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


def attention_forward(q, k, scale_tensor, scale, *pairs):  # type: ignore[no-untyped-def]
    s = scores(q, k, _scale(scale_tensor, scale), Exclude(*pairs))
    lse = logsumexp(s, 1)
    w = _weights(s, lse[None], torch.ones_like(lse)[None], (1.0,), 1)
    return lse, _row_max(s), w @ k.to(w.dtype)


def cross_entropy_forward(q, k, positive, weight, uniform_weight, scale_tensor, scale, *rest):  # type: ignore[no-untyped-def]
    *pairs, decoupled, mask = rest
    scale = _scale(scale_tensor, scale)
    weight = uniform_weight if weight is None else weight
    s = scores(q, k, scale, Exclude(*pairs))
    lse = logsumexp(s, 1)
    margin = lse - positive
    loss = (weight * (margin if decoupled else F.softplus(margin, threshold=80.0))).sum()
    slope = weight * (torch.ones_like(margin) if decoupled else torch.sigmoid(margin))
    w = _weights(s, lse[None], slope[None], (1.0,), 1)
    dq, dk, dscale = _product_gradients(w, q.to(s.dtype), k.to(s.dtype), scale, (mask[0], mask[1], mask[3]))
    return loss, lse, _row_max(s), dq, dk, -slope if mask[2] else s.new_empty(0), dscale


def softplus_forward(q, k, scale_tensor, scale, bias_tensor, bias, *pairs):  # type: ignore[no-untyped-def]
    return similarity_softplus(q, k, _scale(scale_tensor, scale), _scale(bias_tensor, bias), exclude=Exclude(*pairs))


def softplus_backward(grad, q, k, scale_tensor, scale, bias_tensor, bias, *rest):  # type: ignore[no-untyped-def]
    *pairs, mask = rest
    scale = _scale(scale_tensor, scale)
    w = grad[:, None] * torch.sigmoid(scores(q, k, scale, Exclude(*pairs)) + _scale(bias_tensor, bias))
    return *_product_gradients(w, q, k, scale, mask), w.sum() if mask[3] else w.new_empty(0)


def softplus_sum_forward(q, k, weight, uniform_weight, *rest):  # type: ignore[no-untyped-def]
    *args, mask = rest
    rows = softplus_forward(q, k, *args)
    weight = torch.full_like(rows, uniform_weight) if weight is None else weight.to(rows.dtype)
    return (weight * rows).sum(), *softplus_backward(weight, q.to(rows.dtype), k.to(rows.dtype), *args, mask)


def sampled_forward(q, k, indices, sample_mask, scale_tensor, scale):  # type: ignore[no-untyped-def]
    return sampled_logsumexp(q, k, indices, _scale(scale_tensor, scale), mask=sample_mask)


def sampled_backward(grad, q, k, indices, sample_mask, scale_tensor, scale, lse, mask):  # type: ignore[no-untyped-def]
    scale = _scale(scale_tensor, scale)
    qc = q.to(lse.dtype)  # (N, D)
    kc, outside = _draw(k.to(lse.dtype), indices)  # (N, C, D)
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


def normalize_forward(xs, eps):  # type: ignore[no-untyped-def]
    x = torch.cat(list(xs))
    return l2_normalize(xs, eps), torch.linalg.vector_norm(x.to(compute_dtype(x)), dim=1)


def normalize_backward(grad, z, norm, eps):  # type: ignore[no-untyped-def]
    g, zc = grad.to(norm.dtype), z.to(norm.dtype)
    along = ((g * zc).sum(1) * (norm > eps))[:, None] * zc
    return ((g - along) / norm.clamp(min=eps)[:, None]).to(z.dtype)
