# SPDX-License-Identifier: Apache-2.0
"""The supervised contrastive loss: features of one label against all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._autocast import cast_features
from sslkernels.losses import _common as common
from sslkernels.ops.contrastive import (
    Exclude,
    l2_normalize,
    self_similarity_logsumexp,
)


def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | float = 0.1,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    """Supervised contrastive loss: each feature attracts all others of its label.

        z = unit rows of features
        s_ij = <z_i, z_j> / temperature
        P(i) = {j != i: label_j = label_i}
        loss_i = mean_{p in P(i)} -log(exp(s_ip) / sum_{j != i} exp(s_ij))        0 where P(i) is empty
        loss = mean of the rows whose P(i) is not empty

    Source: Khosla et al. 2020, eq. 2 (L_out), without the factor temperature / base_temperature of their code.

    Args:
        features: (N, D), not normalised, or views (B, V, D) of B samples.
        labels: (N,) or (B,), int64, not negative. None, for views: each sample is its own label (SimCLR).
        temperature: number or tensor of one element, which then gets its gradient.
        reduction: "mean", "sum", or "none": (N,) or (B * V,), a sample's views together.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, over all other features.
        sample_weight: (N,) or (B,); the mean is divided by the sum of the weights of the rows that have a positive.
        return_stats: also return detached `top1` (a nearest neighbour of the same label), `positive` (mean logit of
            the positives) and `hardest_negative` (mean over the rows), from the same sweeps.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range; a negative label on the CPU (compiled or on another device its row is NaN).

    Example:
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> supcon(features, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])).backward()
    """
    labels, sample_weight, features = _flat_views(features, labels, sample_weight)
    common.check_options(reduction, label_smoothing)
    scale = common.inverse(temperature, features)
    # rows of one label next to each other: whole tiles of the sweeps are then all positives or all negatives
    labels, order = labels.sort()
    (z,) = cast_features(l2_normalize(features.index_select(0, order)))
    lse_neg, top_neg = self_similarity_logsumexp(z, scale, Exclude(query_groups=labels), return_max=True)
    same = Exclude(diagonal=0, query_groups=labels, differ=True)
    lse_pos, top_pos = self_similarity_logsumexp(z, scale, same, return_max=True)

    group = torch.zeros_like(labels)
    group[1:] = (labels[1:] != labels[:-1]).cumsum(0)
    zc = common.wide(z)
    self_dot = common.row_dot(zc, zc)
    sums = torch.zeros_like(zc).index_add(0, group, zc)  # (groups <= N, D)
    count = torch.zeros_like(self_dot).index_add(0, group, torch.ones_like(self_dot))[group] - 1  # |P(i)|
    mean = (common.row_dot(zc, sums.index_select(0, group)) - self_dot) * (scale / count.clamp(min=1))

    has = count > 0
    lse_pos = lse_pos.where(has, 0.0)
    # with one positive the two are equal: their difference is exactly 0, and so is its gradient
    rows = (lse_pos - mean).where(count > 1, 0.0) + common.softplus(lse_neg - lse_pos)
    if label_smoothing:
        rows = rows + label_smoothing * (mean - (zc @ zc.sum(0) - self_dot) * (scale / max(len(zc) - 1, 1)))
    rows = rows.where(labels >= 0, torch.nan)
    weight = has.to(rows.dtype) if sample_weight is None else has * sample_weight[order].to(rows.dtype)
    loss = _reduce_present(rows, reduction, weight, order)
    if not return_stats:
        return loss
    with torch.no_grad():
        present = has.to(rows.dtype) / has.sum().clamp(min=1)
        stats = {
            "top1": (present * (top_pos > top_neg)).sum(),
            "positive": (present * mean).sum(),
            "hardest_negative": top_neg.mean(),
        }
    return loss, stats


def _flat_views(
    features: Tensor, labels: Tensor | None, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Checked, and with views (B, V, D) flattened sample by sample."""
    check.tensor("features", features)
    if features.ndim not in (2, 3):
        raise ValueError(f"features must be (N, D), or views (B, V, D), got shape {tuple(features.shape)}")
    if features.ndim == 2 and labels is None:
        raise ValueError(f"labels may be None only for views (B, V, D), got features {tuple(features.shape)}")
    check.features(features=features.flatten(0, -2))
    if 0 in features.shape[:-1]:
        raise ValueError(f"features must not be an empty batch, got shape {tuple(features.shape)}")
    common.check_weight(sample_weight, features)
    if labels is None:
        labels = torch.arange(features.shape[0], device=features.device)
    else:
        check.vector("labels", labels, features.shape[0], features, (torch.int64,))
        if check.readable(labels) and bool((labels < 0).any()):
            raise ValueError(f"labels must not be negative, got {labels.min().item()}")
    if features.ndim == 3:
        views = features.shape[1]
        labels = labels.repeat_interleave(views)
        sample_weight = None if sample_weight is None else sample_weight.repeat_interleave(views)
    return labels, sample_weight, features.flatten(0, -2)


def _reduce_present(rows: Tensor, reduction: str, weight: Tensor, order: Tensor) -> Tensor:
    if reduction == "none":
        return torch.zeros_like(rows).index_copy(0, order, rows * weight)
    total = (rows * weight).sum()
    if reduction == "sum":
        return total
    present = weight.sum()
    return total / present.where(present > 0, 1.0)
