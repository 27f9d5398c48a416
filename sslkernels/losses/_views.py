# SPDX-License-Identifier: Apache-2.0
"""Losses between two views of the same samples, all features against all: NT-Xent and its decoupled form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels._autocast import autocasts, cast_features
from sslkernels.distributed import Batch
from sslkernels.distributed.contrastive import self_similarity_logsumexp
from sslkernels.losses import _common as common
from sslkernels.ops.contrastive import KEPT_BYTES, Exclude, l2_normalize, two_view_cross_entropy
from sslkernels.reference._precision import compute_dtype

GPU_BYTES = 4 * KEPT_BYTES  # where calls cost more beside the work: 2N = 2,048 rows, three launches in one op


def _stack(out0: Tensor, out1: Tensor) -> Tensor:
    """Both views' unit rows, (2N, D), as the sweep will see them."""
    return cast_features(l2_normalize(*common.one_dtype(out0, out1)))[0]


def _one_call(
    views: tuple[Tensor, Tensor],
    scale: Tensor | float,
    reduction: str,
    weight: Tensor | None,
    batch: Batch,
    *,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Loss, positives (2, N) and hardest negatives (2, N) from one op, for a small batch: there calls outweigh work.

    None where other ranks have rows, where the rows' weights are no constants, where autocast rounds the unit rows, or
    where the batch is large: the op keeps one more copy of it.
    """
    n = views[0].shape[0]
    if not batch.local or not common.one_sweep(reduction, weight) or autocasts(views[0]):
        return None
    if (2 * n) ** 2 * 4 > (GPU_BYTES if views[0].device.type == "cuda" else KEPT_BYTES):
        return None
    weights: Tensor | float
    if weight is None:
        weights = 0.5 / n if reduction == "mean" else 1.0
    else:
        weight = weight.to(compute_dtype(*views)).repeat(2)
        weights = common.row_weight(weight, reduction, weight, batch)
    out0, out1 = common.one_dtype(*views)
    loss, _, positive, top = two_view_cross_entropy(out0, out1, scale, weight=weights, decoupled=decoupled)
    return loss, positive.view(2, n), top.view(2, n)


@distributed.raises_together
def nt_xent(
    out0: Tensor,
    out1: Tensor,
    temperature: Tensor | float = 0.5,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    beta: float = 0.0,
    tau_plus: float = 0.0,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
) -> Any:
    """NT-Xent: each view finds its partner among all other features of the batch.

        z = unit rows of cat(out0, out1)                                 (2N, D)
        s_ij = <z_i, z_j> / temperature
        loss_i = -log(exp(s_ip) / sum_{j != i} exp(s_ij))                p: the partner of i
        loss = mean of the 2N rows

    Source: Chen et al. 2020, eq. 1; the mean over 2N is lightly's, the original's code has twice this value.

    Args:
        out0, out1: the two views' projections, (N, D), not normalised.
        temperature: number or tensor of one element, which then gets its gradient.
        reduction: "mean", "sum", or "none": (2N,), the rows of out0 first.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, over the 2N - 1 candidates.
        beta: weight negatives by exp(beta * s) (Robinson et al. 2021, "hard negatives").
        tau_plus: expected share of false negatives, taken out of the denominator (Chuang et al. 2020, "debiased").
        sample_weight: (N,), a weight for both rows of a sample; the mean is divided by the sum of the weights.
        return_stats: also return detached `top1`, `positive` and `hardest_negative` (logits) of the own rows, from the
            same sweep.
        process_group, strategy: as in `distributed.Group`; all other features are then those of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range.

    Example:
        >>> out0, out1 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
        >>> nt_xent(out0, out1, temperature=0.1).backward()
    """
    common.check_pair(sample_weight, out0=out0, out1=out1)
    common.check_options(reduction, label_smoothing, beta, tau_plus)
    n = out0.shape[0]
    batch = distributed.batch(
        *(process_group, strategy, "nt_xent"),
        out0=out0, out1=out1, temperature=temperature, sample_weight=sample_weight, reduction=reduction,
        label_smoothing=label_smoothing, beta=beta, tau_plus=tau_plus, return_stats=return_stats,
    )  # fmt: skip
    if n < 2 and batch.local and (beta or tau_plus):
        raise ValueError(f"out0 must have at least two samples for beta or tau_plus, got shape {tuple(out0.shape)}")
    scale = common.inverse(temperature, out0)
    plain = not (label_smoothing or beta or tau_plus)
    if plain and (found := _one_call((out0, out1), scale, reduction, sample_weight, batch, decoupled=False)):
        return (found[0], common.statistics(*found[1:])) if return_stats else found[0]
    z = _stack(out0, out1)
    lse, positive, *top = self_similarity_logsumexp(
        batch,
        z,
        scale,
        Exclude(diagonal=0, period=n),
        scales=(1.0 + beta, beta) if beta else None,
        return_positive=True,
        return_max=return_stats,
    )
    positive = positive.view(2, n)
    others = 2 * batch.total(z) - 2  # negatives of a row
    lse = common.negatives(lse.view(*lse.shape[:-1], 2, n), positive, others, scale, beta, tau_plus)
    rows = common.softplus(lse - positive)  # (2, N)
    if label_smoothing:
        zc = common.wide(z)
        sums = batch.sum(zc.sum(0))
        mean = ((zc @ sums - common.row_dot(zc, zc)) * (scale / (others + 1))).view(2, n)
        rows = rows + label_smoothing * (positive - mean)
    loss = common.reduce(rows, reduction, sample_weight, batch)
    return (loss, common.statistics(positive, top[0].view(2, n))) if return_stats else loss


@distributed.raises_together
def dcl(
    out0: Tensor,
    out1: Tensor,
    temperature: Tensor | float = 0.1,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
) -> Any:
    """Decoupled contrastive loss: NT-Xent without the positive in its denominator.

        z = unit rows of cat(out0, out1)                                 (2N, D)
        s_ij = <z_i, z_j> / temperature
        loss_i = -w_i s_ip + log sum_{j not in {i, p}} exp(s_ij)         p: the partner of i
        loss = mean of the 2N rows
        w = weight_fn(z0, z1) for the rows of out0, weight_fn(z1, z0) for those of out1; 1 without it

    Source: Yeh et al. 2022, eq. 6; the negatives of both views share one sum, as in lightly's DCLLoss.

    Args:
        out0, out1: the two views' projections, (N, D), not normalised; N > 1.
        temperature, reduction, sample_weight, return_stats, process_group, strategy: as in `nt_xent`.
        weight_fn: called with the two views' unit rows, returns the positives' weights (N,). Over several ranks it is
            called with the rows of all, in the order of the ranks, which are gathered for it whatever the strategy.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: as in `nt_xent`; fewer than two samples; weights of another shape.

    Example:
        >>> out0, out1 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
        >>> dcl(out0, out1).backward()
    """
    common.check_pair(sample_weight, out0=out0, out1=out1)
    common.check_options(reduction)
    n = out0.shape[0]
    batch = distributed.batch(
        *(process_group, strategy, "dcl"),
        out0=out0, out1=out1, temperature=temperature, weight_fn=weight_fn, sample_weight=sample_weight,
        reduction=reduction, return_stats=return_stats,
    )  # fmt: skip
    if n < 2 and batch.local:
        raise ValueError(f"out0 must have at least two samples, as one has no negative, got shape {tuple(out0.shape)}")
    scale = common.inverse(temperature, out0)
    one = weight_fn is None and _one_call((out0, out1), scale, reduction, sample_weight, batch, decoupled=True)
    if one:
        return (one[0], common.statistics(*one[1:])) if return_stats else one[0]
    z = _stack(out0, out1)
    others = Exclude(diagonal=0, period=n)
    lse, positive, *top = self_similarity_logsumexp(
        batch, z, scale, others, return_positive=True, return_max=return_stats
    )
    positive = positive.view(2, n)
    rows = lse.view(2, n) - (positive if weight_fn is None else positive * _positive_weights(weight_fn, z, batch))
    loss = common.reduce(rows, reduction, sample_weight, batch)
    return (loss, common.statistics(positive, top[0].view(2, n))) if return_stats else loss


def _positive_weights(weight_fn: Callable[[Tensor, Tensor], Tensor], z: Tensor, batch: Batch) -> Tensor:
    """(2, N), of the own rows."""
    z0, z1 = z.chunk(2)
    if not batch.local:
        z0, z1 = batch.gather(torch.cat([z0, z1], 1)).chunk(2, 1)
    weights = weight_fn(z0, z1), weight_fn(z1, z0)
    for w in weights:
        check.tensor("the result of weight_fn", w)
        if w.shape != (z0.shape[0],):
            raise ValueError(f"weight_fn must return shape ({z0.shape[0]},), got {tuple(w.shape)}")
    return torch.stack([batch.own(w) for w in weights])


def mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """`weight_fn` of DCLW (Yeh et al. 2022, section 4): 2 - N softmax(<z0, z1> / sigma) over the batch, detached."""
    check.positive("sigma", sigma)
    similarity = common.row_dot(out0.detach(), out1.detach()) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)
