# SPDX-License-Identifier: Apache-2.0
"""Losses that name a token or a code: masked and causal language modelling, next sentences, HuBERT's units.

The logits, (tokens, V), are not stored, and rows that do not count cost nothing: see `sslkernels.ops.tokens`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.losses import _common as common
from sslkernels.losses import _means as means
from sslkernels.losses._hubert import HuBERTLoss, hubert_loss
from sslkernels.losses._module import Loss
from sslkernels.ops.tokens import linear_cross_entropy

__all__ = [
    "CausalLMLoss",
    "HuBERTLoss",
    "MaskedLMLoss",
    "NextSentenceLoss",
    "causal_lm_loss",
    "hubert_loss",
    "masked_lm_loss",
    "next_sentence_loss",
]


def _check_options(reduction: str, label_smoothing: float, z_loss: float) -> None:
    common.check_options(reduction, label_smoothing)
    check.in_range("z_loss", z_loss, 0.0, math.inf)


def _cross_entropy(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    process_group: Any,
    **options: float,
) -> Tensor:
    """Of the tokens of all ranks; the labels are what each position is asked for."""
    brought = {"hidden": hidden, "weight": weight, "bias": bias, "reduction": reduction, **options}
    batch = means.counted_batch(process_group, name, **brought)

    def loss(reduction: str) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction=reduction, ignore_index=ignore_index, **options
        )

    return means.reduce_by(loss, reduction, batch, lambda: (labels != ignore_index).sum())


@distributed.raises_together
def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = common.IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    process_group: Any = None,
) -> Tensor:
    """Masked language modelling: cross-entropy of the tokens that were hidden.

        logits_i = hidden_i weight^T + bias
        loss_i = logsumexp(logits_i) - logits_i[labels_i]        over the i with labels_i != ignore_index
        loss = mean of the rows that count

    The mean is the plain one. BERT's code divides by their number + 1e-5, which also makes it 0 where no token counts;
    here, as in `torch.nn.functional.cross_entropy`, it is then NaN.

    Source: Devlin et al. 2019, `run_pretraining.py::get_masked_lm_output`.

    Args:
        hidden: (..., D), what the encoder says of each position, after the head's transform.
        weight: (V, D), often the token embedding itself: the gradients of both uses add up.
        labels: (...) int64, the tokens that were there, ignore_index where nothing is asked.
        bias: (V,).
        label_smoothing, z_loss: as in `sslkernels.ops.linear_cross_entropy`.
        reduction: "mean", "sum", or "none": (...), 0 where ignored.
        process_group: as in `distributed.Group`; the mean is then over the tokens that count on all ranks, any number
            on each, also none.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range; a label outside of [0, V) on the CPU (compiled: RuntimeError; on another device its row is NaN).

    Example:
        >>> hidden, embedding = torch.randn(2, 10, 16, requires_grad=True), torch.randn(100, 16)
        >>> labels = torch.full((2, 10), -100)
        >>> labels[:, 3] = 42
        >>> masked_lm_loss(hidden, embedding, labels).backward()
    """
    common.check_labels({"hidden": hidden}, labels, ("weight", weight), bias, ignore_index)
    _check_options(reduction, label_smoothing, z_loss)
    return _cross_entropy(
        "masked_lm_loss",
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        process_group=process_group,
    )


@distributed.raises_together
def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = common.IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    process_group: Any = None,
) -> Tensor:
    """Causal language modelling: every position names the token after it. The shift happens in here.

        logits_t = hidden_t weight^T + bias
        loss_i = logsumexp(logits_t) - logits_t[labels_{t+1}]    i = (b, t), t < L - 1, labels_{t+1} != ignore_index
        loss = mean of the rows that count

    Labels are the tokens themselves, as for transformers' causal models: it is the targets that are shifted, and hidden
    is not copied. ignore_index as the label of a token leaves that token unasked: padding, a prompt, or the first token
    of a document, which must not be told from the document before.

    Source: Radford et al. 2018, eq. 1; z-loss: Chowdhery et al. 2022.

    Args:
        hidden: (..., L, D), L >= 2.
        labels: (..., L) int64.
        weight, bias, label_smoothing, z_loss, process_group: as in `masked_lm_loss`.
        reduction: "mean", "sum", or "none": (..., L), 0 where ignored and in the last position.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input); the mean is NaN where no token counts.

    Raises:
        ValueError, TypeError: as in `masked_lm_loss`; a sequence of one token.

    Example:
        >>> tokens, embedding = torch.randint(100, (2, 10)), torch.randn(100, 16)
        >>> hidden = torch.randn(2, 10, 16, requires_grad=True)
        >>> causal_lm_loss(hidden, embedding, tokens).backward()
    """
    common.check_labels({"hidden": hidden}, labels, ("weight", weight), bias, ignore_index)
    _check_options(reduction, label_smoothing, z_loss)
    if labels.shape[-1] < 2:
        raise ValueError(f"hidden must have at least two positions (..., L, D), got shape {tuple(hidden.shape)}")
    last = labels.new_full((*labels.shape[:-1], 1), ignore_index)
    following = torch.cat([labels[..., 1:], last], dim=-1)
    return _cross_entropy(
        "causal_lm_loss",
        hidden,
        weight,
        following,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        process_group=process_group,
    )


@distributed.raises_together
def next_sentence_loss(logits: Tensor, labels: Tensor, *, reduction: str = "mean", process_group: Any = None) -> Tensor:
    """BERT's next sentence prediction: does the second segment follow the first one?

        loss_i = log(exp(logits_i0) + exp(logits_i1)) - logits_i[labels_i]        labels: 0 it follows, 1 it is random
        loss = mean of the rows

    Source: Devlin et al. 2019, `run_pretraining.py::get_next_sentence_output`.

    Args:
        logits: (B, 2).
        labels: (B,) int64, 0 or 1.
        reduction: "mean", "sum" or "none": (B,).
        process_group: as in `distributed.Group`; the mean is then over the rows of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; a label other than 0
            and 1 on the CPU (compiled or on another device its row is NaN).

    Example:
        >>> logits = torch.randn(4, 2, requires_grad=True)
        >>> next_sentence_loss(logits, torch.tensor([0, 1, 1, 0])).backward()
    """
    check.features(logits=logits)
    if logits.shape[1] != 2:
        raise ValueError(f"logits must have shape (B, 2), got {tuple(logits.shape)}")
    check.not_empty("logits", logits)
    check.vector("labels", labels, logits.shape[0], logits, (torch.int64,))
    check.ids("labels", labels, 2)
    common.check_options(reduction)
    batch = distributed.batch(process_group, None, "next_sentence_loss", logits=logits, reduction=reduction)
    x = common.wide(logits)
    sign = torch.where(labels == 0, 1.0, torch.where(labels == 1, -1.0, torch.nan)).to(x.dtype)
    return common.reduce(common.softplus((x[:, 1] - x[:, 0]) * sign), reduction, None, batch)


class MaskedLMLoss(Loss):
    """`masked_lm_loss` as a module, called with (hidden, weight, labels, bias=None).

    Example:
        >>> hidden, embedding = torch.randn(2, 10, 16, requires_grad=True), torch.randn(100, 16)
        >>> MaskedLMLoss(label_smoothing=0.1)(hidden, embedding, torch.randint(100, (2, 10))).backward()
    """

    def __init__(
        self,
        ignore_index: int = common.IGNORE,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        process_group: Any = None,
    ) -> None:
        check.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        _check_options(reduction, label_smoothing, z_loss)
        super().__init__(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction)
        self.span = {"process_group": process_group}

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return masked_lm_loss(hidden, weight, labels, bias, **self.options, **self.span)


class CausalLMLoss(MaskedLMLoss):
    """`causal_lm_loss` as a module, called with (hidden, weight, labels, bias=None).

    Example:
        >>> hidden, embedding = torch.randn(2, 10, 16, requires_grad=True), torch.randn(100, 16)
        >>> CausalLMLoss(z_loss=1e-4)(hidden, embedding, torch.randint(100, (2, 10))).backward()
    """

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return causal_lm_loss(hidden, weight, labels, bias, **self.options, **self.span)


class NextSentenceLoss(Loss):
    """`next_sentence_loss` as a module, called with (logits, labels).

    Example:
        >>> NextSentenceLoss()(torch.randn(4, 2, requires_grad=True), torch.tensor([0, 1, 1, 0])).backward()
    """

    def __init__(self, *, reduction: str = "mean", process_group: Any = None) -> None:
        super().__init__(reduction=reduction)
        self.span = {"process_group": process_group}

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return next_sentence_loss(logits, labels, **self.options, **self.span)
