# SPDX-License-Identifier: Apache-2.0
"""What DINO, iBOT and DINOv2 share: passes over crops, and a watch for collapse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.ops import sinkhorn_center

MONITORED = 32  # rows of the teacher


def check_crops(crops: Sequence[Tensor]) -> None:
    """Two global crops, and all of the same images."""
    shapes = [tuple(crop.shape) for crop in crops]
    if len(shapes) < 2 or shapes[0] != shapes[1] or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"crops must be two global ones of one shape, then others of the same images, got {shapes}")


def rows_of_crops(network: Callable[[Tensor], Tensor], crops: Sequence[Tensor]) -> list[Tensor]:
    """network's rows of all crops, in order: neighbours of one size go through it together."""
    runs = itertools.groupby(crops, key=lambda crop: crop.shape[1:])
    return [network(torch.cat(list(run))) for _, run in runs]


@torch.no_grad()
def teacher_metrics(rows: Tensor, weight: Tensor, center: Tensor | None, temperature: float) -> dict[str, Tensor]:
    """What tells a collapse, of a few of the teacher's bottlenecks (N, D).

    teacher_entropy: mean of H(p_i) for p_i = softmax((weight z_i - center) / temperature), at most log V.
    teacher_kl: mean of KL(p_i | mean p), at most log of the number of rows: 0 when all rows are alike, be they one
    prototype each (entropy 0) or all prototypes (entropy log V).

    No center: Sinkhorn's, of these rows.
    """
    logits = F.linear(rows[:MONITORED], weight).float()
    if center is None:
        center = sinkhorn_center(logits, epsilon=temperature)
    log_p = ((logits - center.view(-1)) / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=-1).mean()
    return {"teacher_entropy": entropy, "teacher_kl": torch.special.entr(p.mean(dim=0)).sum() - entropy}
