# SPDX-License-Identifier: Apache-2.0
"""InfoNCE: each query finds its key, among those of the batch, of a queue or of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels._autocast import cast_features
from sslkernels.distributed import Batch
from sslkernels.distributed import contrastive as spread
from sslkernels.losses import _common as common
from sslkernels.ops import contrastive as ops
from sslkernels.ops.contrastive import Exclude

OTHERS = Exclude(diagonal=0)
ALL = Exclude()


@distributed.raises_together
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: Tensor | float = 0.1,
    *,
    in_batch: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    beta: float = 0.0,
    tau_plus: float = 0.0,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
    sharded_negatives: bool = False,
) -> Any:
    """InfoNCE, one direction: each query finds its key.

        q, k, n = unit rows of query, positive_key, negative_keys
        loss_i = -log(exp(<q_i, k_i> / T) / (exp(<q_i, k_i> / T) + sum over its negatives of exp(<q_i, n> / T)))
        negatives of i: the other rows of positive_key        without negative_keys
                        negative_keys                         (M, D), shared: MoCo's queue
                        negative_keys[i]                      (N, M, D), its own
        loss = mean of the rows

    Keys that need no gradient cost one sweep and are not kept: a queue given as `negative_keys` may be overwritten
    before backward.

    Source: van den Oord et al. 2018, eq. 4; He et al. 2020, eq. 1.

    Args:
        query, positive_key: (N, D), paired by position.
        negative_keys: (M, D) or (N, M, D), M > 0.
        temperature: number or tensor of one element, which then gets its gradient.
        in_batch: with negative_keys, the other rows of positive_key are negatives too.
        normalize: False takes all features as they are: unit rows already (MoCo's queue, no copy of it is made), or
            plain dot products (CPC).
        reduction: "mean", "sum" or "none": (N,).
        label_smoothing: as in `torch.nn.functional.cross_entropy`, over the positive and all negatives.
        beta: weight negatives by exp(beta * s) (Robinson et al. 2021, "hard negatives").
        tau_plus: expected share of false negatives, taken out of the denominator (Chuang et al. 2020, "debiased");
            for unit rows.
        sample_weight: (N,); the mean is divided by the sum of the weights.
        return_stats: also return detached `top1`, `positive` and `hardest_negative` (logits) of the own rows.
        process_group, strategy: as in `distributed.Group`; the other rows of positive_key are then those of all ranks.
            negative_keys (M, D) must be the same on all, as those of a queue that each fills with the keys of all.
        sharded_negatives: negative_keys (M, D), without gradient, are this rank's shard: those of all ranks together
            are every query's negatives. The queries travel to the shards, and backward exchanges nothing.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range.

    Example:
        >>> query, key, queue = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), torch.randn(64, 16)
        >>> info_nce(query, key, queue, temperature=0.07).backward()
    """
    common.check_pair(sample_weight, query=query, positive_key=positive_key)
    common.check_options(reduction, label_smoothing, beta, tau_plus)
    _check_negatives(query, negative_keys, sharded_negatives)
    in_batch = in_batch or negative_keys is None
    batch = distributed.batch(
        *(process_group, strategy, "info_nce"),
        query=query, positive_key=positive_key, negative_keys=negative_keys, temperature=temperature,
        sample_weight=sample_weight, in_batch=in_batch, normalize=normalize, reduction=reduction,
        label_smoothing=label_smoothing, beta=beta, tau_plus=tau_plus, sharded_negatives=sharded_negatives,
    )  # fmt: skip
    scale = common.inverse(temperature, query)
    features = [x for x in (query, positive_key, negative_keys) if x is not None]
    if normalize:
        features = [common.normalize(x) for x in features]
    q, k, *rest = cast_features(*features)
    positive = common.row_dot(q, k) * scale
    sharded = sharded_negatives and not batch.local
    holders = batch if sharded else distributed.alone(q)  # of the negative keys
    given: Any = 0 if negative_keys is None else negative_keys.shape[-2]
    if sharded and (label_smoothing or beta or tau_plus):
        given = batch.sum(positive.new_full((), given))
    count = given + (batch.total(positive) - 1 if in_batch else 0)
    if batch.local and not count and (beta or tau_plus):
        raise ValueError(f"query must have at least two samples for beta or tau_plus, got shape {tuple(query.shape)}")

    at_hand = batch.local if not rest else rest[0].ndim == 2 and not (in_batch or sharded)  # and shared
    if at_hand and common.one_sweep(reduction, sample_weight) and not (beta or tau_plus):
        weight = common.row_weight(positive, reduction, sample_weight, batch)
        keys, pairs = (rest[0], ALL) if rest else (k, OTHERS)
        loss, _, top = ops.similarity_cross_entropy(q, keys, positive, scale, weight=weight, exclude=pairs)
    else:
        parts = [_log_sum(batch, q, k, scale, OTHERS, beta)] if in_batch else []
        parts += [_log_sum(holders, q, x, scale, ALL, beta, sharded) for x in rest]
        lse, top = parts[0]
        for lse_part, top_part in parts[1:]:
            lse, top = torch.logaddexp(lse, lse_part), torch.maximum(top, top_part)
        lse = common.negatives(lse, positive, count, scale, beta, tau_plus)
        loss = common.reduce(common.softplus(lse - positive), reduction, sample_weight, batch)
    if label_smoothing:
        total = batch.sum(common.wide(k).sum(0)) if in_batch else 0.0
        for x in rest:
            total = total + holders.sum(common.wide(x).sum(-2))
        candidates = (q * total).sum(-1) * scale + (0.0 if in_batch else positive)
        excess = positive - candidates / (count + 1)
        loss = loss + label_smoothing * common.reduce(excess, reduction, sample_weight, batch)
    return (loss, common.statistics(positive, top)) if return_stats else loss


def _check_negatives(query: Tensor, negative_keys: Tensor | None, sharded: bool) -> None:
    if sharded and (negative_keys is None or negative_keys.ndim != 2 or negative_keys.requires_grad):
        raise ValueError(f"sharded_negatives needs negative_keys (M, D) without gradient, got {_told(negative_keys)}")
    if negative_keys is None:
        return
    check.tensor("negative_keys", negative_keys)
    if negative_keys.ndim not in (2, 3):
        raise ValueError(f"negative_keys must be (M, D) or (N, M, D), got shape {tuple(negative_keys.shape)}")
    if negative_keys.ndim == 3 and negative_keys.shape[0] != query.shape[0]:
        raise ValueError(
            f"negative_keys must have as many rows as query ({query.shape[0]}), got shape {tuple(negative_keys.shape)}"
        )
    check.features(query=query, negative_keys=negative_keys.flatten(0, -2))
    if negative_keys.shape[-2] == 0:
        raise ValueError(f"negative_keys must not be empty, got shape {tuple(negative_keys.shape)}")


def _told(x: Tensor | None) -> str:
    return "none" if x is None else f"shape {tuple(x.shape)}{', requires_grad' * x.requires_grad}"


def _log_sum(
    batch: Batch, q: Tensor, k: Tensor, scale: Tensor | float, pairs: Exclude, beta: float, sharded: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each query's negatives, (N,), or (2, N) at scales 1 + beta and beta; and the largest logit."""
    multipliers = (1.0 + beta, beta) if beta else (1.0,)
    if k.ndim == 3:
        flat = k.flatten(0, 1)  # (N * M, D)
        own = torch.arange(flat.shape[0], device=k.device).view(k.shape[:2])
        lse = [ops.sampled_logsumexp(q, flat, own, scale * m) for m in multipliers]
        with torch.no_grad():
            top = (torch.einsum("nd,nmd->nm", common.wide(q), common.wide(k)) * scale).amax(1)
        return (torch.stack(lse) if beta else lse[0]), top
    sweep = (
        partial(spread.sharded_logsumexp, batch, q, k)
        if sharded
        else partial(spread.similarity_logsumexp, batch, q, k, exclude=pairs, columns=False)
    )
    if beta and not k.requires_grad:
        # one sweep for each scale instead of one for both, as only that form keeps no keys for backward
        hard, _, top = sweep(scale=scale * (1.0 + beta), return_max=True)
        soft, _ = sweep(scale=scale * beta)
        return torch.stack([hard, soft]), top / (1.0 + beta)
    together = {"scales": multipliers} if beta else {}
    lse, _, top = sweep(scale=scale, return_max=True, **together)
    return lse, top
