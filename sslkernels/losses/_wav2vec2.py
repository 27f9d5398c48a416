# SPDX-License-Identifier: Apache-2.0
"""wav2vec 2.0: each masked frame finds its quantized target; the sum of its terms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels._autocast import cast_features
from sslkernels._random import seed_tensor
from sslkernels.losses import _common as common
from sslkernels.losses import _means as means
from sslkernels.losses._diversity import diversity_loss
from sslkernels.losses._module import Loss
from sslkernels.ops.contrastive import distractor_counts
from sslkernels.ops.patches import gather_tokens
from sslkernels.reference._precision import full_precision


@distributed.raises_together
def wav2vec2_loss(
    context: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    num_negatives: int = 100,
    temperature: Tensor | float = 0.1,
    reduction: str = "mean",
    ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
) -> Any:
    """wav2vec 2.0: each masked frame finds its quantized target among distractors.

        s_ij = <unit(context_i), unit(targets_j)> / temperature          i, j: masked frames of one utterance
        loss_i = -log(exp(s_ii) / (exp(s_ii) + sum over its distractors j of exp(s_ij)))
        loss = mean over the masked frames

    Distractors are num_negatives draws, uniform over the other masked frames of the utterance, with replacement; a
    distractor with the target's ids or, without ids, equal to it element by element, does not count. fairseq gathers
    them, several copies of (num_negatives + 1, frames, D); here an utterance's products are one small matrix, weighted
    by how often each was drawn: memory O(frames^2) for an utterance, whatever num_negatives. fairseq's criterion
    returns the sum and the number of masked frames, by which the trainer divides. An utterance with one masked frame
    adds a row of 0.

    Source: Baevski et al. 2020, eq. 3; fairseq `models/wav2vec/wav2vec2.py::{sample_negatives, compute_preds}`.

    Args:
        context: (B, T, D), the context network's frames after the final projection, not normalised.
        targets: (B, T, D), the quantized features of the unmasked input; gets its gradient as well.
        mask: (B, T) bool, True where a frame was hidden; what a padded frame must not be. None: all were, for frames
            that are gathered already.
        temperature: number, or tensor of one element, which then gets its gradient.
        reduction: "mean", "sum", or "none": (B, T), 0 where not masked.
        ids: (B, T) or (B, T, G) int64, the codes that the targets were made of. A layer behind the quantizer may round
            two rows of one code differently, which only ids then tell.
        generator, seed: of the draws, as in `sslkernels.ops.random_mask`; neither: torch's own generator.
        return_stats: also return detached `top1` (the target beats all distractors), `positive` and `hardest_negative`
            (mean logits), of the own frames.
        process_group: as in `distributed.Group`; the mean is then over the masked frames of all ranks, any number on
            each, also none. Distractors are of the own utterance as ever; seeds are best of each rank's own.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats). The mean is NaN where no frame is masked.

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range.

    Example:
        >>> context, targets = torch.randn(2, 50, 16, requires_grad=True), torch.randn(2, 50, 16)
        >>> wav2vec2_loss(context, targets, torch.rand(2, 50) < 0.5, seed=0).backward()
    """
    common.check_sequences(context=context, targets=targets)
    if context.shape != targets.shape:
        raise ValueError(f"targets must have the shape of context {tuple(context.shape)}, got {tuple(targets.shape)}")
    common.check_options(reduction)
    check.integer("num_negatives", num_negatives, 1)
    scale = common.inverse(temperature, context)
    _check_ids(ids, context)
    check.mask(mask, context.shape[:2], context)
    seed = seed_tensor(seed, generator, context.device)  # now, as ranks wait for one that is refused it later
    ranks = means.counted_batch(
        *(process_group, "wav2vec2_loss"),
        context=context, temperature=temperature, num_negatives=num_negatives, reduction=reduction,
    )  # fmt: skip
    batch, length, _ = context.shape
    if mask is None:
        lengths = torch.full((batch,), length, device=context.device)
        rank = torch.arange(length, device=context.device).expand(batch, length)
        mask = torch.ones_like(rank, dtype=torch.bool)
    else:
        lengths, rank = mask.sum(1), (mask.cumsum(1) - 1).clamp(min=0)
        if check.readable(mask):
            length = max(int(lengths.max()), 1)
        # masked frames first; what follows them repeats the first one, so that no frame outside of the mask is read
        frames = (~mask).byte().argsort(dim=1, stable=True)[:, :length]
        frames = torch.where(torch.arange(length, device=mask.device) < lengths[:, None], frames, frames[:, :1])
        context, targets = gather_tokens(context, frames), gather_tokens(targets, frames)
        none = (lengths == 0)[:, None, None]  # what stands in for the frames of such an utterance may be anything
        context, targets = context.masked_fill(none, 0.0), targets.masked_fill(none, 0.0)
        ids = ids if ids is None else ids.take_along_dim(frames.view(*frames.shape, *[1] * (ids.ndim - 2)), 1)

    counts = distractor_counts(lengths, length, num_negatives, seed=seed)
    key = _row_keys(targets.detach() + 0.0 if ids is None else ids.reshape(*ids.shape[:2], -1))  # -0 is 0
    counts.masked_fill_(key[:, :, None] == key[:, None, :], 0.0)
    some = counts.any(2)
    counts.masked_fill_(~some[:, :, None], 1.0)  # a log-sum-exp of nothing has no gradient
    q, k = cast_features(common.normalize(context), common.normalize(targets))
    q, k = common.one_dtype(common.wide(q), common.wide(k))
    multiplicity = counts.to(q.dtype).log()
    with full_precision(q):
        s = torch.baddbmm(multiplicity, q * scale, k.mT)  # (B, M, M), -inf where nothing was drawn
    positive = common.row_dot(q, k) * scale
    rows = common.softplus(torch.logsumexp(s, 2) - positive).where(some, 0.0)  # (B, M)
    rows = rows.gather(1, rank).where(mask, 0.0)
    loss = means.reduce_by(lambda how: _reduced(rows, lengths, how), reduction, ranks, lengths.sum)
    if not return_stats:
        return loss
    with torch.no_grad():
        top = (s - multiplicity).where((counts > 0) & some[:, :, None], -torch.inf).amax(2)
        share = (torch.arange(length, device=mask.device) < lengths[:, None]) / lengths.sum()
        stats = {"top1": positive > top, "positive": positive, "hardest_negative": top.where(top > -torch.inf, 0.0)}
        return loss, {name: (share * x).sum() for name, x in stats.items()}


def _reduced(rows: Tensor, lengths: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else rows.sum() / lengths.sum() if reduction == "mean" else rows.sum()


def _check_ids(ids: Any, context: Tensor) -> None:
    if ids is None:
        return
    check.tensor("ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be torch.int64, got {ids.dtype}")
    if ids.ndim not in (2, 3) or ids.shape[:2] != context.shape[:2]:
        expected = f"{tuple(context.shape[:2])}, or that with the groups behind it"
        raise ValueError(f"ids must have shape {expected}, got {tuple(ids.shape)}")
    check.same_device("ids", ids, "context", context)


def _row_keys(x: Tensor) -> Tensor:
    """(B, M) int64 for (B, M, D), the same for equal rows; two others share it with a chance of 2^-64."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(integer).to(torch.int64)
    column = torch.arange(1, x.shape[-1] + 1, device=x.device) * -0x61C8864680B583EB
    return _mix(_mix(bits) * (column | 1) + column).sum(-1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 31)) * -0x61C8864680B583EB
    return x ^ (x >> 29)


@distributed.raises_together
def penalty_of_all_frames(features_penalty: Any, context: Tensor, *, process_group: Any) -> Tensor:
    """What this rank adds for a mean over its own frames."""
    check.tensor("features_penalty", features_penalty)
    check.number("features_penalty", features_penalty, context)
    mean = features_penalty.reshape(())
    batch = means.counted_batch(process_group, "Wav2Vec2Loss", context=context)
    if batch.local:
        return mean
    own = common.wide(mean).new_full((), context.shape[:2].numel())
    return mean * (batch.world * own / batch.sum(own))


class Wav2Vec2Loss(Loss):
    """`wav2vec2_loss` as a module, plus its two other terms where their inputs are given.

        loss = contrastive + diversity_weight * diversity_loss(probabilities) + penalty_weight * features_penalty

    fairseq adds the last two times the number of masked frames to the sum over those, and divides all by that number:
    the same. With a process_group the probabilities are averaged over the masked frames of all ranks, whose number each
    tells by its mask, and the penalty over their frames, whose number the context tells.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Args:
        num_negatives: distractors of a frame.
        temperature: number, or nn.Parameter to be learned.
        diversity_weight: of `diversity_loss`.
        penalty_weight: of the penalty, the mean of the squared convolutional features.
        process_group: as in `wav2vec2_loss`.

    `forward(context, targets, mask=None, probabilities=None, features_penalty=None, *, ids=None, generator=None,
    seed=None, return_stats=False)`: `wav2vec2_loss`'s, the mean probabilities (G, V) of the quantizer, and the penalty
    as a tensor of no dimension. With return_stats the stats also hold what was added, `contrastive`, `diversity` and
    `penalty`, each detached and before its weight.

    Example:
        >>> context, targets = torch.randn(2, 50, 16, requires_grad=True), torch.randn(2, 50, 16)
        >>> Wav2Vec2Loss()(context, targets, torch.rand(2, 50) < 0.5, torch.full((2, 320), 1 / 320)).backward()
    """

    def __init__(
        self,
        num_negatives: int = 100,
        temperature: nn.Parameter | float = 0.1,
        diversity_weight: float = 0.1,
        penalty_weight: float = 10.0,
        *,
        process_group: Any = None,
    ) -> None:
        check.integer("num_negatives", num_negatives, 1)
        check.in_range("diversity_weight", diversity_weight, 0.0, math.inf)
        check.in_range("penalty_weight", penalty_weight, 0.0, math.inf)
        super().__init__(temperature, num_negatives=num_negatives)
        self.diversity_weight, self.penalty_weight = diversity_weight, penalty_weight
        self.span = {"process_group": process_group}

    def forward(
        self,
        context: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        probabilities: Tensor | None = None,
        features_penalty: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        call = {**self.options, **self.span, "temperature": self.temperature}
        draws: dict[str, Any] = {"ids": ids, "generator": generator, "seed": seed}
        found = wav2vec2_loss(context, targets, mask, **call, **draws, return_stats=return_stats)
        loss, stats = found if return_stats else (found, {})
        stats["contrastive"] = loss.detach()
        if probabilities is not None:
            alone = self.span["process_group"] is None
            count = None if alone else context.shape[:2].numel() if mask is None else mask.sum()
            diversity = diversity_loss(probabilities, count=count, **self.span)
            loss, stats["diversity"] = loss + self.diversity_weight * diversity, diversity.detach()
        if features_penalty is not None:
            penalty = penalty_of_all_frames(features_penalty, context, **self.span)
            loss, stats["penalty"] = loss + self.penalty_weight * penalty, penalty.detach()
        return (loss, stats) if return_stats else loss

    def extra_repr(self) -> str:
        weights = f"diversity_weight={self.diversity_weight}, penalty_weight={self.penalty_weight}"
        return f"{super().extra_repr()}, {weights}"
