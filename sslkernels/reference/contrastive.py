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

from sslkernels.reference._precision import compute_dtype


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
    rows = [logsumexp(times(s, beta), 1) for beta in scales or (1.0,)]
    cols = [logsumexp(times(s, beta), 0) for beta in scales or (1.0,)] if columns else None
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


def two_view_cross_entropy(
    out0: Tensor,
    out1: Tensor,
    scale: Tensor | float = 1.0,
    *,
    weight: Tensor | float = 1.0,
    decoupled: bool = False,
) -> Tensor:
    """sum_i weight_i softplus(lse_i - positive_i) over the 2N unit rows; a row's positive is the other view's."""
    z, n = l2_normalize([out0, out1]), out0.shape[0]
    lse = self_similarity_logsumexp(z, scale, exclude=Exclude(diagonal=0, period=n))
    margin = lse - positives(z, z, scale, n)
    return (weight * (margin if decoupled else F.softplus(margin, threshold=80.0))).sum()


def sampled_logsumexp(
    q: Tensor, k: Tensor, indices: Tensor, scale: Tensor | float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    """lse_i = log sum_c exp(scale <q_i, k_indices[i, c]>) over the samples where mask[i, c] is True. (N,)

    An index outside the keys reads nothing and makes its row NaN.
    """
    dtype = compute_dtype(q, k)
    drawn, outside = draw(k.to(dtype), indices)
    s = torch.einsum("nd,ncd->nc", q.to(dtype) * scale, drawn)  # (N, C)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return logsumexp(s.masked_fill(outside, torch.nan), 1)


def draw(k: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, D) the keys drawn, and (N, C) where the index is none of theirs."""
    outside = (indices < 0) | (indices >= k.shape[0])
    return k[indices.masked_fill(outside, 0)], outside


def times(s: Tensor, beta: float) -> Tensor:
    # 0 * -inf is NaN, but a pair left out stays left out at every scale
    return s if beta == 1.0 else torch.where(s == -torch.inf, s, s * beta)
