# SPDX-License-Identifier: Apache-2.0
"""wav2vec 2.0's diversity of codes, which is a function of the batch's mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed import Batch
from sslkernels.losses import _common as common


@distributed.raises_together
def diversity_loss(
    probabilities: Tensor, eps: float = 1e-7, *, count: Tensor | int | None = None, process_group: Any = None
) -> Tensor:
    """wav2vec 2.0's diversity: the share of the codes that are not used, in perplexity.

        loss_i = V - exp(-sum_v p_iv log(p_iv + eps))        i: a group of codes
        loss = sum of loss_i / (G V)

    Source: Baevski et al. 2020, eq. 4; fairseq `models/wav2vec/wav2vec2.py::get_extra_losses`.

    Args:
        probabilities: (G, V), the mean over frames of each group's softmax, without noise and temperature:
            `sslkernels.nn.GumbelVectorQuantizer` returns it.
        count: how many frames this mean is of, a number or a tensor of one element: its weight among those of other
            ranks. None: the same on all of them.
        process_group: as in `distributed.Group`; the mean is then over the frames of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        The loss in [0, 1), float32 (float64 for float64 input): 0 where all codes are equally probable.

    Raises:
        ValueError, TypeError: probabilities of another rank or dtype, or without an element.

    Example:
        >>> diversity_loss(torch.full((2, 320), 1 / 320)) < 1e-4
        tensor(True)
    """
    check.features(probabilities=probabilities)
    check.positive("eps", eps)
    if probabilities.numel() == 0:
        raise ValueError(f"probabilities must not be empty, got shape {tuple(probabilities.shape)}")
    if count is not None:
        _check_count(count, probabilities)
    batch = distributed.batch(process_group, None, "diversity_loss", probabilities=probabilities[None], eps=eps)
    return _diversity(common.wide(probabilities), eps, 1 if count is None else count, batch)


def _check_count(count: Any, like: Tensor) -> None:
    if not isinstance(count, Tensor):
        return check.integer("count", count, 0)
    check.tensor("count", count)
    if count.numel() != 1:
        raise ValueError(f"count must be a number or a tensor of one element, got shape {tuple(count.shape)}")
    check.same_device("count", count, "probabilities", like)


def _diversity(p: Tensor, eps: float, count: Tensor | int, batch: Batch) -> Tensor:
    if not batch.local:
        own = count.reshape(1).to(p.dtype) if isinstance(count, Tensor) else p.new_full((1,), count)
        weighted = torch.where(own > 0, p * own, 0.0)  # the mean of no frame may be anything
        sums = batch.sum(torch.cat([weighted.flatten(), own]))
        p = sums[:-1].view_as(p) / sums[-1].clamp(min=1)
    return 1.0 - torch.exp(-(p * torch.log(p + eps)).sum(1)).sum() / p.numel()
