# SPDX-License-Identifier: Apache-2.0
"""KoLeo: features that keep away from their nearest neighbours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed.neighbors import nearest_other
from sslkernels.losses._module import Loss, spanning
from sslkernels.ops.contrastive import l2_normalize
from sslkernels.ops.neighbors import nearest
from sslkernels.reference._precision import compute_dtype

__all__ = ["KoLeoLoss", "koleo_loss"]


@distributed.raises_together
def koleo_loss(x: Tensor, eps: float = 1e-8, *, p: float = 2.0, process_group: Any = None) -> Tensor:
    """How close the rows of x lie to each other: a regularizer that spreads a batch's features over the sphere.

        u_i    = x_i / max(|x_i|, eps)
        n(i)   = argmax over j != i of <u_i, u_j>                no gradient; the smaller index of two
        loss_i = -log(|u_i - u_n(i) + eps|_p + eps)              eps is added to every component
        loss   = mean of the rows

    The gradient reaches u_i and its neighbour, and is of the order of 1 / |u_i - u_n(i)|. A pair of equal rows, or one
    with a row shorter than eps, adds a constant and no gradient: no direction leads them apart, and what the formula
    gives there, 1 / eps along (1, ..., 1), overflows float16.

    Args:
        x: (N, D), N > 1. 16-bit rows are computed in float32, where eps is not zero; so it is under autocast.
        eps: below every length.
        p: of the distance's norm, 1 or more.
        process_group: as in `distributed.Group`; neighbours are then sought on all ranks, which gather the rows: a
            Group of another strategy is refused. DINOv2 has none, and DINOv3 groups of a few ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Returns:
        scalar, float32 (float64 if x is).

    Raises:
        ValueError, TypeError: x of another rank or dtype; fewer than two rows (a rank among several may have one); eps
            or p out of range; a strategy other than "gather".

    Example:
        >>> koleo_loss(torch.randn(8, 16, requires_grad=True)).backward()

    Source: Sablayrolles et al. 2019 (arXiv:1806.03198); facebookresearch/dinov2 `dinov2/loss/koleo_loss.py`, lightly
    `KoLeoLoss`.
    """
    check.features(x=x)
    _check_options(p, eps, process_group)
    if not x.shape[0]:
        raise ValueError(f"x must have at least 2 rows, got shape {tuple(x.shape)}")
    batch = distributed.batch(process_group, None, "koleo_loss", x=x, eps=eps, p=p)
    if batch.local and x.shape[0] < 2:
        raise ValueError(f"x must have at least 2 rows, got shape {tuple(x.shape)}")
    wide = x.to(compute_dtype(x))
    u = l2_normalize(wide, eps=eps)
    short = torch.linalg.vector_norm(wide.detach(), dim=1) < eps
    if batch.local:
        neighbor = nearest(u, metric="dot", exclude_self=True)[1]
        other, other_short = u.index_select(0, neighbor), short[neighbor]
    else:
        everything = batch.gather(x).to(wide.dtype)
        row = everything.index_select(0, nearest_other(batch, u, everything, eps))
        other, other_short = l2_normalize(row, eps=eps), torch.linalg.vector_norm(row.detach(), dim=1) < eps
    constant = (u == other).all(1) | short | other_short
    distance = F.pairwise_distance(u, other, p, eps)
    return -batch.mean((torch.where(constant, distance.detach(), distance) + eps).log())


def _check_options(p: Any, eps: Any, process_group: Any) -> None:
    check.positive("eps", eps)
    check.in_range("p", p, 1.0, float("inf"))
    if isinstance(process_group, distributed.Group) and process_group.strategy != "gather":
        raise ValueError(f"strategy must be 'gather', which is all that KoLeo offers, got {process_group.strategy!r}")


class KoLeoLoss(Loss):
    """`koleo_loss` as a module, with lightly's arguments and `process_group`.

    Example:
        >>> loss = KoLeoLoss()(torch.randn(8, 16))
    """

    def __init__(self, p: float = 2, eps: float = 1e-8, *, process_group: Any = None) -> None:
        _check_options(p, eps, process_group)
        super().__init__(p=p, eps=eps)
        self.span = spanning(False, process_group, None)

    def forward(self, x: Tensor) -> Tensor:
        group = self.span["process_group"]
        return koleo_loss(x, self.options["eps"], p=self.options["p"], process_group=group)
