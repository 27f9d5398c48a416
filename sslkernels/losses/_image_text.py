# SPDX-License-Identifier: Apache-2.0
"""Losses between images and texts, paired by position: CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sslkernels import distributed
from sslkernels._autocast import cast_features
from sslkernels.distributed import contrastive as spread
from sslkernels.losses import _common as common
from sslkernels.losses._module import Loss, spanning
from sslkernels.ops.contrastive import Exclude

OTHERS = Exclude(diagonal=0)


@distributed.raises_together
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
) -> Any:
    """CLIP's symmetric cross-entropy between images and texts.

        s_ij = logit_scale * <image_i, text_j>
        loss_i = (-log(exp(s_ii) / sum_j exp(s_ij)) - log(exp(s_ii) / sum_j exp(s_ji))) / 2
        loss = mean of the rows

    Source: Radford et al. 2021, figure 3; open_clip's ClipLoss.

    Args:
        image_features, text_features: (N, D), paired by position; unit rows are the caller's business.
        logit_scale: number or tensor of one element: the multiplier itself, not its logarithm.
        logit_bias: accepted as open_clip does. A softmax does not change with it: its gradient is zero.
        reduction: "mean", "sum" or "none": (N,).
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in both directions.
        sample_weight: (N,), a weight for both directions of a pair; the mean is divided by the sum of the weights.
        return_stats: also return detached `top1`, `positive` and `hardest_negative` (logits) from image to text, of the
            own images.
        process_group, strategy: as in `distributed.Group`; the other images and texts are then those of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process. Texts
    alone travel: what they have of a rank's images comes home as one number a text, for half the products and half the
    bytes of gathering both.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range; a number that is not finite.

    Example:
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = clip_loss(image, text, logit_scale=1 / 0.07)
    """
    common.check_pair(sample_weight, image_features=image_features, text_features=text_features)
    common.check_options(reduction, label_smoothing)
    batch = distributed.batch(
        *(process_group, strategy, "clip_loss"),
        image_features=image_features, text_features=text_features, logit_scale=logit_scale, logit_bias=logit_bias,
        sample_weight=sample_weight, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    scale = common.scalar("logit_scale", logit_scale, image_features)
    image, text = cast_features(image_features, text_features)
    row, col, positive, top = spread.similarity_logsumexp(
        batch, image, text, scale, OTHERS, return_positive=True, return_max=True
    )
    rows = common.softplus(torch.stack([row, col]) - positive).mean(0)
    if label_smoothing:
        i, t = common.wide(image), common.wide(text)
        mean = (i @ batch.sum(t.sum(0)) + t @ batch.sum(i.sum(0))) * (scale / (2 * batch.total(i)))
        rows = rows + label_smoothing * (positive - mean)
    if logit_bias is not None:
        bias = common.scalar("logit_bias", logit_bias, image_features)
        if isinstance(bias, Tensor):
            rows = rows + 0.0 * bias  # a parameter that is given has a gradient: DistributedDataParallel insists
    loss = common.reduce(rows, reduction, sample_weight, batch)
    return (loss, common.statistics(positive, top)) if return_stats else loss


@distributed.raises_together
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    strategy: str | None = None,
) -> Any:
    """SigLIP: every pair of an image and a text is its own yes-or-no question.

        s_ij = logit_scale * <image_i, text_j> + logit_bias
        loss_i = -log sigmoid(s_ii) - sum_{j != i} log sigmoid(-s_ij)
        loss = mean of the rows

    Source: Zhai et al. 2023, eq. 1; open_clip's SigLipLoss.

    Args:
        image_features, text_features: (N, D), paired by position; unit rows are the caller's business.
        logit_scale, logit_bias: numbers or tensors of one element; no bias is 0. The scale is the multiplier itself,
            not its logarithm.
        reduction: "mean", "sum" or "none": (N,), the images' rows.
        label_smoothing: targets 1 - label_smoothing / 2 and label_smoothing / 2, as in Keras' BinaryCrossentropy.
        sample_weight: (N,), weights of the images' rows; the mean is divided by their sum.
        return_stats: also return detached `top1`, `positive` and `hardest_negative` (logits, bias included) from image
            to text. They cost one more product: this loss needs no maximum.
        process_group, strategy: as in `distributed.Group`; the texts are then those of all ranks. Images stay where
            they are. For a mean or a sum the texts' gradients come home in the forward, whose work they share: all
            ranks must then scale their loss alike.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input), or (loss, stats).

    Raises:
        ValueError, TypeError: as in `clip_loss`.

    Example:
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = siglip_loss(image, text, logit_scale=10.0, logit_bias=-10.0)
    """
    common.check_pair(sample_weight, image_features=image_features, text_features=text_features)
    common.check_options(reduction, label_smoothing)
    batch = distributed.batch(
        *(process_group, strategy, "siglip_loss"),
        image_features=image_features, text_features=text_features, logit_scale=logit_scale, logit_bias=logit_bias,
        sample_weight=sample_weight, reduction=reduction, label_smoothing=label_smoothing, return_stats=return_stats,
    )  # fmt: skip
    scale = common.scalar("logit_scale", logit_scale, image_features)
    bias = 0.0 if logit_bias is None else common.scalar("logit_bias", logit_bias, image_features)
    image, text = cast_features(image_features, text_features)
    positive = common.row_dot(image, text) * scale + bias
    rows = common.softplus(-positive)
    if label_smoothing:
        i, t = common.wide(image), common.wide(text)
        total = (i @ batch.sum(t.sum(0))) * scale + batch.total(i) * bias  # sum_j s_ij
        rows = rows + 0.5 * label_smoothing * (2 * positive - total)
    if common.one_sweep(reduction, sample_weight):
        weight = common.row_weight(positive, reduction, sample_weight, batch)
        negative = spread.similarity_softplus_sum(batch, image, text, scale, bias, weight=weight, exclude=OTHERS)
        loss = negative + common.reduce(rows, reduction, sample_weight, batch)
    else:
        rows = rows + spread.similarity_softplus(batch, image, text, scale, bias, OTHERS)
        loss = common.reduce(rows, reduction, sample_weight, batch)
    if not return_stats:
        return loss
    with torch.no_grad():
        _, _, top = spread.similarity_logsumexp(batch, image, text, scale, OTHERS, columns=False, return_max=True)
    return loss, common.statistics(positive, top + bias)


class ImageTextLoss(Loss):
    function: Callable[..., Any]

    def __init__(
        self,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        super().__init__(reduction=reduction, label_smoothing=label_smoothing)
        self.span = spanning(False, process_group, strategy)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        call = {**self.options, **self.span, "sample_weight": sample_weight, "return_stats": return_stats}
        result = type(self).function(image_features, text_features, logit_scale, logit_bias, **call)
        if not output_dict:
            return result
        loss, *stats = result if return_stats else (result,)
        return ({"contrastive_loss": loss}, *stats) if return_stats else {"contrastive_loss": loss}


class ClipLoss(ImageTextLoss):
    """`clip_loss` as a module.

    `process_group` is in place of open_clip's `rank`, `world_size`, `local_loss`, `gather_with_grad`, `cache_labels`
    and `use_horovod`. There the gradients depend on a pair of flags: by default they are 1 / world_size of the true
    ones, `local_loss=True` alone leaves out what comes through other ranks' features, which turns them, and with
    `gather_with_grad=True` they are right. Here they are right.

    Args:
        reduction, label_smoothing, process_group, strategy: as in `clip_loss`.

    `forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)` is open_clip's;
    `output_dict=True` gives `{"contrastive_loss": loss}`.

    Example:
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = ClipLoss()(image, text, logit_scale=torch.tensor(1 / 0.07))
    """

    function = staticmethod(clip_loss)


class SigLipLoss(ImageTextLoss):
    """`siglip_loss` as a module; `process_group` is in place of open_clip's `rank`, `world_size` and `dist_impl`.

    Args:
        reduction, label_smoothing, process_group, strategy: as in `siglip_loss`.

    `forward(image_features, text_features, logit_scale, logit_bias, output_dict=False)` is open_clip's;
    `output_dict=True` gives `{"contrastive_loss": loss}`.

    Example:
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = SigLipLoss()(image, text, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-10.0))
    """

    function = staticmethod(siglip_loss)
