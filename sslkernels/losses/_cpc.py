# SPDX-License-Identifier: Apache-2.0
"""Contrastive predictive coding: a context finds the frames that come later."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels._autocast import cast_features
from sslkernels.distributed import Batch
from sslkernels.distributed.contrastive import similarity_logsumexp
from sslkernels.losses import _common as common
from sslkernels.losses._module import shown_span, spanning
from sslkernels.ops import contrastive as ops
from sslkernels.ops.contrastive import Exclude
from sslkernels.reference._precision import full_precision

NEGATIVES = ("batch", "sequence")


@distributed.raises_together
def cpc_loss(
    context: Tensor,
    z: Tensor,
    predictors: Tensor,
    *,
    negatives: str = "batch",
    reduction: str = "mean",
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
) -> Any:
    """Contrastive predictive coding: each context names the frames that come k = 1, ..., K steps later.

        s_kij = <predictors_k context_i, z_j>
        loss_i = -log(exp(s_kip) / sum_j exp(s_kij))        i = (b, t), p = (b, t + k), t < T - k, for each k
        j: all frames of the batch         negatives="batch"
           all frames of i's sequence      negatives="sequence"
        loss = mean over k of the mean over the rows of step k

    Dot products as they are: no normalisation, no temperature. predictors_k is applied to the context, so that a step
    is one product of two sets of frames, whose matrix is not stored ("batch"), or one for each sequence, (B, T - k, T).

    Source: van den Oord et al. 2018, eq. 3 and 4.

    Args:
        context: (B, T, C), c_t has seen the frames up to t.
        z: (B, T, D), the encoder's frames.
        predictors: (K, D, C), K < T.
        reduction: "mean", "sum" (over steps and rows), or "none": (K, B, T), 0 where there is no frame t + k.
        return_stats: also return detached `top1`, `positive` and `hardest_negative` (mean logits), each (K,), of the
            own rows.
        process_group, strategy: as in `distributed.Group`; all frames of the batch are then those of all ranks. What is
            in a sequence stays there, and strategy has no meaning with negatives="sequence".

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; not more frames than
            steps; an option out of range.

    Example:
        >>> context, z = torch.randn(4, 20, 8, requires_grad=True), torch.randn(4, 20, 16, requires_grad=True)
        >>> cpc_loss(context, z, torch.randn(3, 16, 8)).backward()
    """
    common.check_sequences(context=context, z=z)
    check.floating("predictors", predictors)
    wanted = (z.shape[2], context.shape[2])
    if predictors.ndim != 3 or predictors.shape[0] == 0 or predictors.shape[1:] != wanted:
        raise ValueError(f"predictors must have shape (K, {wanted[0]}, {wanted[1]}), got {tuple(predictors.shape)}")
    check.same_device("predictors", predictors, "context", context)
    steps = predictors.shape[0]
    if context.shape[1] <= steps:
        raise ValueError(f"context must have more frames than steps ({steps}), got shape {tuple(context.shape)}")
    check.choice("negatives", negatives, NEGATIVES)
    common.check_options(reduction)
    batch = distributed.batch(
        *(process_group, strategy, "cpc_loss"),
        context=context, z=z, predictors=predictors, negatives=negatives, reduction=reduction,
        return_stats=return_stats,
    )  # fmt: skip
    context, z, predictors = cast_features(context, z, predictors)
    dtype = torch.promote_types(context.dtype, predictors.dtype)
    context, predictors = context.to(dtype), predictors.to(dtype)
    step = _sequence_step
    if negatives == "batch":
        # time first: frames that have one k steps later are a leading block, and that one a fixed distance away
        step, context, z = _batch_step, context.transpose(0, 1).contiguous(), z.transpose(0, 1).contiguous()
    if negatives == "batch" and not batch.local:
        results = _steps_of_all_ranks(context, z, predictors, reduction, batch)
    else:
        results = [step(context, z, w, k, reduction) for k, w in enumerate(predictors, start=1)]
    losses = torch.stack([loss for loss, _, _ in results])
    loss = losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
    if negatives == "sequence" and not batch.local and reduction != "none":
        loss = batch.weigh(loss) if reduction == "mean" else loss * batch.world
    if not return_stats:
        return loss
    stats = [common.statistics(positive, top.amax(1) if top.ndim == 2 else top) for _, positive, top in results]
    return loss, {name: torch.stack([x[name] for x in stats]) for name in stats[0]}


def _batch_step(context: Tensor, z: Tensor, predictor: Tensor, k: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, positives and hardest negatives of step k; context and z are (T, B, ...)."""
    rows, batch = context.shape[0] - k, context.shape[1]
    q, keys = F.linear(context[:rows].flatten(0, 1), predictor), z.flatten(0, 1)
    q, keys = cast_features(q, keys)
    positive = common.row_dot(q, keys[k * batch :])
    others = Exclude(diagonal=k * batch)
    if reduction == "none":
        lse, _, top = ops.similarity_logsumexp(q, keys, 1.0, others, columns=False, return_max=True)
        losses = common.softplus(lse - positive).view(rows, batch)
        return F.pad(losses.T, (0, k)), positive, top  # (B, T), 0 in the last k frames
    weight = common.row_weight(positive, reduction, None, distributed.alone(positive))
    loss, _, top = ops.similarity_cross_entropy(q, keys, positive, 1.0, weight=weight, exclude=others)
    return loss, positive, top


def _steps_of_all_ranks(
    context: Tensor, z: Tensor, predictors: Tensor, reduction: str, batch: Batch
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As `_batch_step`, all steps in one sweep, so that the frames travel once; context and z are (T, B, ...).

    Each step's queries stand at the place of the frame that they predict, behind zeros where there is none to do so.
    """
    steps, (frames, samples) = predictors.shape[0], z.shape[:2]
    named = [F.pad(F.linear(context[:-k], w), (0, 0, 0, 0, k, 0)) for k, w in enumerate(predictors, start=1)]
    q, z = cast_features(torch.stack(named), z)
    positives = common.row_dot(q, z)  # (K, T, B)
    own = Exclude(diagonal=0, period=frames * samples)
    sides = batch, q.flatten(0, 2), z.flatten(0, 1)
    lse, _, top = similarity_logsumexp(*sides, 1.0, own, columns=False, return_max=True)
    rows = common.softplus(lse.view(positives.shape) - positives)
    found = []
    for k in range(1, steps + 1):
        losses = rows[k - 1, k:]  # (T - k, B)
        loss = F.pad(losses.T, (0, k)) if reduction == "none" else common.reduce(losses, reduction, None, batch)
        found.append((loss, positives[k - 1, k:].flatten(), top.view(positives.shape)[k - 1, k:].flatten()))
    return found


def _sequence_step(
    context: Tensor, z: Tensor, predictor: Tensor, k: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_batch_step`, and all scores in place of the hardest; context and z are (B, T, ...)."""
    frames = z.shape[1]
    q, keys = (common.wide(x) for x in cast_features(F.linear(context[:, : frames - k], predictor), z))
    q, keys = common.one_dtype(q, keys)
    positive = common.row_dot(q, keys[:, k:])
    t = torch.arange(frames, device=z.device)
    others = q.new_zeros(frames - k, frames).masked_fill(t[:-k, None] + k == t, -torch.inf)
    with full_precision(q):
        s = torch.baddbmm(others, q, keys.mT)  # (B, T - k, T)
    losses = common.softplus(torch.logsumexp(s, 2) - positive)
    top = s.detach().flatten(0, 1)
    if reduction == "none":
        return F.pad(losses, (0, k)), positive.flatten(), top
    return (losses.mean() if reduction == "mean" else losses.sum()), positive.flatten(), top


class CPCLoss(nn.Module):
    """`cpc_loss` with its predictors, one linear map from the context to the frames for each step.

    Args:
        context_dim: C.
        dim: D, of the frames z.
        steps: K.
        negatives, reduction, process_group, strategy: as in `cpc_loss`.

    The parameter `predictors` is (K, D, C); each starts as `torch.nn.Linear`'s weight does.

    Example:
        >>> context, z = torch.randn(4, 20, 8, requires_grad=True), torch.randn(4, 20, 16, requires_grad=True)
        >>> CPCLoss(8, 16, steps=3)(context, z).backward()
    """

    def __init__(
        self,
        context_dim: int,
        dim: int,
        steps: int = 12,
        *,
        negatives: str = "batch",
        reduction: str = "mean",
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        super().__init__()
        self.span = spanning(False, process_group, strategy)
        for name, x in (("context_dim", context_dim), ("dim", dim), ("steps", steps)):
            check.integer(name, x, 1)
        check.choice("negatives", negatives, NEGATIVES)
        common.check_options(reduction)
        self.negatives, self.reduction = negatives, reduction
        self.predictors = nn.Parameter(torch.empty(steps, dim, context_dim))
        nn.init.uniform_(self.predictors, -(context_dim**-0.5), context_dim**-0.5)

    def forward(self, context: Tensor, z: Tensor, *, return_stats: bool = False) -> Any:
        options: dict[str, Any] = {
            "negatives": self.negatives,
            "reduction": self.reduction,
            "return_stats": return_stats,
            **self.span,
        }
        return cpc_loss(context, z, self.predictors, **options)

    def extra_repr(self) -> str:
        steps, dim, context_dim = self.predictors.shape
        sizes = f"context_dim={context_dim}, dim={dim}, steps={steps}"
        return ", ".join([f"{sizes}, negatives={self.negatives}, reduction={self.reduction}", *shown_span(self.span)])
