# SPDX-License-Identifier: Apache-2.0
"""HuBERT: each hidden frame names its unit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.losses import _common as common
from sslkernels.losses import _means as means
from sslkernels.losses._module import Loss
from sslkernels.ops.tokens import linear_cross_entropy


@distributed.raises_together
def hubert_loss(
    x: Tensor,
    label_embeddings: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    pred_masked_weight: float = 1.0,
    pred_nomask_weight: float = 0.0,
    temperature: Tensor | float = 0.1,
    ignore_index: int = common.IGNORE,
    reduction: str = "mean",
    process_group: Any = None,
) -> Tensor:
    """HuBERT: each hidden frame names its unit, by the cosine to the units' embeddings.

        s_ic = <unit(x_i), unit(e_c)> / temperature
        loss_i = w_i (logsumexp_c(s_ic) - s_i[labels_i])        w_i: pred_masked_weight or pred_nomask_weight
        loss = sum of the rows / number of frames whose weight is not zero

    fairseq has C + 1 logits, the true unit's in front and its duplicate at -inf: the same C-way softmax, on a broadcast
    of (C + 1, frames, D), where here is one product. Its criterion returns the sum and this number as sample_size, by
    which the trainer divides. Frames of weight zero are left out of the product. Add 10 * mean(features^2), the penalty
    on the convolutional features, as its recipe does.

    Source: Hsu et al. 2021, eq. 1 to 3; fairseq `models/hubert/hubert.py::compute_nce`, `hubert_criterion.py`.

    Args:
        x: (..., D), the frames after the final projection, not normalised.
        label_embeddings: (C, D), not normalised.
        labels: (...) int64; ignore_index for padding.
        mask: (...) bool, True where a frame was hidden. None: all were.
        temperature: number, or tensor of one element, which then gets its gradient.
        reduction: "mean", "sum", or "none": (...), 0 where the weight is zero or the label ignored.
        process_group: as in `distributed.Group`; the number of frames is then that of all ranks, any number on each,
            also none.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss, float32 (float64 for float64 input); the mean is NaN where no frame counts.

    Raises:
        ValueError, TypeError: an argument of another rank, shape, dtype or device; an empty batch; an option out of
            range; both weights zero; a label outside of [0, C) on the CPU (compiled: RuntimeError; on another
            device its row is NaN).

    Example:
        >>> x, units = torch.randn(2, 50, 16, requires_grad=True), torch.rand(100, 16)
        >>> labels, mask = torch.randint(100, (2, 50)), torch.rand(2, 50) < 0.5
        >>> hubert_loss(x, units, labels, mask).backward()
    """
    common.check_labels({"x": x}, labels, ("label_embeddings", label_embeddings), ignore_index=ignore_index)
    check.mask(mask, labels.shape, x)
    common.check_options(reduction)
    _check_weights(pred_masked_weight, pred_nomask_weight)
    scale = common.inverse(temperature, x)
    batch = means.counted_batch(
        *(process_group, "hubert_loss"),
        x=x, label_embeddings=label_embeddings, temperature=temperature, pred_masked_weight=pred_masked_weight,
        pred_nomask_weight=pred_nomask_weight, reduction=reduction,
    )  # fmt: skip
    q, units = common.normalize(x), common.normalize(common.wide(label_embeddings)) * scale
    if mask is None or pred_masked_weight == pred_nomask_weight:
        parts = [(labels, pred_masked_weight)]
    else:
        hidden, seen = labels.masked_fill(~mask, ignore_index), labels.masked_fill(mask, ignore_index)
        parts = [(hidden, pred_masked_weight), (seen, pred_nomask_weight)]
    # a part of weight zero is left out; where that is all of them, nothing is asked
    nothing = [(torch.full_like(labels, ignore_index), 1.0)]
    parts = [(target, weight) for target, weight in parts if weight] or nothing

    def count() -> Tensor:
        asked = labels if len(parts) == 2 else parts[0][0]
        return (asked != ignore_index).sum()

    def loss(reduction: str) -> Tensor:
        one = reduction if len(parts) == 1 or reduction == "none" else "sum"
        values = [
            linear_cross_entropy(q, units, target, reduction=one, ignore_index=ignore_index) for target, _ in parts
        ]
        if len(values) == 1:
            # a loss as it is needs no further pass over its gradients
            return values[0] if parts[0][1] == 1 else parts[0][1] * values[0]
        total = parts[0][1] * values[0] + parts[1][1] * values[1]
        return means.quotient(total, count()) if reduction == "mean" else total

    return means.reduce_by(loss, reduction, batch, count)


def _check_weights(pred_masked_weight: float, pred_nomask_weight: float) -> None:
    check.in_range("pred_masked_weight", pred_masked_weight, 0.0, math.inf)
    check.in_range("pred_nomask_weight", pred_nomask_weight, 0.0, math.inf)
    if not (pred_masked_weight or pred_nomask_weight):
        raise ValueError("pred_masked_weight and pred_nomask_weight must not both be 0, got 0 and 0")


class HuBERTLoss(Loss):
    """`hubert_loss` as a module, called with (x, label_embeddings, labels, mask=None).

    Args:
        temperature: number, or nn.Parameter to be learned.
        pred_masked_weight, pred_nomask_weight, ignore_index, reduction, process_group: as in `hubert_loss`.

    Example:
        >>> x, units = torch.randn(2, 50, 16, requires_grad=True), torch.rand(100, 16)
        >>> HuBERTLoss()(x, units, torch.randint(100, (2, 50)), torch.rand(2, 50) < 0.5).backward()
    """

    def __init__(
        self,
        pred_masked_weight: float = 1.0,
        pred_nomask_weight: float = 0.0,
        *,
        temperature: Any = 0.1,
        ignore_index: int = common.IGNORE,
        reduction: str = "mean",
        process_group: Any = None,
    ) -> None:
        _check_weights(pred_masked_weight, pred_nomask_weight)
        weights = {"pred_masked_weight": pred_masked_weight, "pred_nomask_weight": pred_nomask_weight}
        super().__init__(temperature, **weights, ignore_index=ignore_index, reduction=reduction)
        self.span = {"process_group": process_group}

    def forward(self, x: Tensor, label_embeddings: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        call = {**self.options, **self.span, "temperature": self.temperature}
        return hubert_loss(x, label_embeddings, labels, mask, **call)
