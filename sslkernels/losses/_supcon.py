# SPDX-License-Identifier: Apache-2.0
"""The supervised contrastive loss: features of one label against all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels._autocast import cast_features
from sslkernels.distributed import Batch
from sslkernels.distributed.contrastive import group_sums, self_similarity_logsumexp
from sslkernels.losses import _common as common
from sslkernels.ops.contrastive import Exclude, l2_normalize


@distributed.raises_together
def supcon(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | float = 0.1,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
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
            the positives) and `hardest_negative` (mean over the rows), from the same sweeps, of the own rows.
        process_group, strategy: as in `distributed.Group`; all other features, and rows of the same label, are then
            those of all ranks. Labels travel with the features. Without labels a sample is its own label.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range; a negative label on the CPU (compiled or on another device its row is NaN).

    Example:
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> supcon(features, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])).backward()
    """
    common.check_options(reduction, label_smoothing)
    _check(features, labels, sample_weight)
    batch = distributed.batch(
        *(process_group, strategy, "supcon"),
        features=features, labels=labels, temperature=temperature, sample_weight=sample_weight, reduction=reduction,
        label_smoothing=label_smoothing, return_stats=return_stats,
    )  # fmt: skip
    scale = common.inverse(temperature, features)
    labels, sample_weight, features = _flat_views(features, labels, sample_weight, batch)
    # rows of one label next to each other: whole tiles of the sweeps are then all positives or all negatives
    labels, order = labels.sort()
    (z,) = cast_features(l2_normalize(features.index_select(0, order)))
    lse_neg, *top_neg = _log_sum(batch, z, scale, Exclude(query_groups=labels), return_stats)
    same = Exclude(diagonal=0, query_groups=labels, differ=True)
    lse_pos, *top_pos = _log_sum(batch, z, scale, same, return_stats)

    zc = common.wide(z)
    self_dot = common.row_dot(zc, zc)
    sums, count = group_sums(batch, zc if batch.local else z, labels)  # rows travel in 16 bits where they have them
    count = count - 1  # |P(i)|
    mean = (common.row_dot(zc, sums) - self_dot) * (scale / count.clamp(min=1))

    has = count > 0
    lse_pos = lse_pos.where(has, 0.0)
    # with one positive the two are equal: their difference is exactly 0, and so is its gradient
    rows = (lse_pos - mean).where(count > 1, 0.0) + common.softplus(lse_neg - lse_pos)
    if label_smoothing:
        others = batch.total(zc) * (len(zc) // batch.rows) - 1
        candidates = (zc @ batch.sum(zc.sum(0)) - self_dot) * (scale / (others + (others == 0)))
        rows = rows + label_smoothing * (mean - candidates)
    rows = rows.where(labels >= 0, torch.nan)
    weight = has.to(rows.dtype) if sample_weight is None else has * sample_weight[order].to(rows.dtype)
    loss = _reduce_present(rows, reduction, weight, order, batch)
    if not return_stats:
        return loss
    with torch.no_grad():
        present = has.to(rows.dtype) / has.sum().clamp(min=1)
        stats = {
            "top1": (present * (top_pos[0] > top_neg[0])).sum(),
            "positive": (present * mean).sum(),
            "hardest_negative": top_neg[0].mean(),
        }
    return loss, stats


def _log_sum(batch: Batch, z: Tensor, scale: Tensor | float, pairs: Exclude, return_max: bool) -> list[Tensor]:
    """The log-sum-exps, and the row maxima where they are asked for: each pair of ranks then meets twice."""
    found = self_similarity_logsumexp(batch, z, scale, pairs, return_max=return_max)
    return list(found) if return_max else [found]


def _check(features: Tensor, labels: Tensor | None, sample_weight: Tensor | None) -> None:
    check.tensor("features", features)
    if features.ndim not in (2, 3):
        raise ValueError(f"features must be (N, D), or views (B, V, D), got shape {tuple(features.shape)}")
    if features.ndim == 2 and labels is None:
        raise ValueError(f"labels may be None only for views (B, V, D), got features {tuple(features.shape)}")
    check.features(features=features.flatten(0, -2))
    if 0 in features.shape[:-1]:
        raise ValueError(f"features must not be an empty batch, got shape {tuple(features.shape)}")
    common.check_weight(sample_weight, features)
    if labels is not None:
        check.vector("labels", labels, features.shape[0], features, (torch.int64,))
        if check.readable(labels) and bool((labels < 0).any()):
            raise ValueError(f"labels must not be negative, got {labels.min().item()}")


def _flat_views(
    features: Tensor, labels: Tensor | None, sample_weight: Tensor | None, batch: Batch
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Labels, weights and features, with views (B, V, D) flattened sample by sample."""
    if labels is None:  # no two samples of any ranks have one
        labels = torch.arange(batch.rows, device=features.device) * batch.world + batch.rank
    if features.ndim == 3:
        views = features.shape[1]
        labels = labels.repeat_interleave(views)
        sample_weight = None if sample_weight is None else sample_weight.repeat_interleave(views)
    return labels, sample_weight, features.flatten(0, -2)


def _reduce_present(rows: Tensor, reduction: str, weight: Tensor, order: Tensor, batch: Batch) -> Tensor:
    if reduction == "none":
        return torch.zeros_like(rows).index_copy(0, order, rows * weight)
    total = (rows * weight).sum()
    if not batch.local:
        total = total * batch.world
    if reduction == "sum":
        return total
    present = batch.sum(weight.sum())
    return total / present.where(present > 0, 1.0)
