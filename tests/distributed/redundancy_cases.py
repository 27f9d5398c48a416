# SPDX-License-Identifier: Apache-2.0
"""Models whose losses compare features over the rows of all ranks, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from contract import Case
from torch import Tensor, nn

from sslkernels import losses

NARROW, WIDE = 6, 48  # fewer features than rows of two ranks; more than twice the rows of four


class Views(nn.Module):
    """Views through one encoder, and a loss of them."""

    def __init__(self, loss: Callable[..., Tensor], width: int) -> None:
        super().__init__()
        # a shift of a feature changes no covariance: without the curve the bias would have no gradient
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.loss = loss

    def forward(self, *views: Tensor, **options: Any) -> Tensor:
        return self.loss(*(self.encoder(view) for view in views), **options)


class TiCo(nn.Module):
    """TiCo's covariance goes from one batch to the next."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.covariance = options, None

    def forward(self, a: Tensor, b: Tensor, process_group: Any = None, strategy: Any = None) -> Tensor:
        options = {**self.options, "process_group": process_group}
        loss, self.covariance = losses.tico_loss(a, b, self.covariance, **options)
        return loss


def views(*shape: int) -> Callable[[int, torch.Generator], Sequence[Tensor]]:
    def data(n: int, generator: torch.Generator) -> Sequence[Tensor]:
        a, b = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return a, a + 0.3 * b

    return data


def case(loss: Callable[..., Any], *shape: int) -> Case:
    return Case(lambda: Views(loss, shape[-1]), views(*shape))


def frossl(*z_views: Tensor, **options: Any) -> Tensor:
    return losses.frossl_loss([*z_views, z_views[0] - 2 * z_views[1]], 0.5, **options)


def paper(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return losses.vicreg_loss(a, b, 1.0, 2.0, 3.0, variant="paper", **options)


barlow_narrow, barlow_wide = (case(losses.barlow_twins_loss, d) for d in (NARROW, WIDE))
vicreg_narrow, vicreg_wide = (case(losses.vicreg_loss, d) for d in (NARROW, WIDE))
vicreg_positions = case(paper, 2, WIDE)
frossl_narrow, frossl_wide = (case(frossl, d) for d in (NARROW, WIDE))
tico = Case(lambda: Views(TiCo(), NARROW), views(NARROW))
tico_through = Case(lambda: Views(TiCo(beta=0.5, through_batch=True), NARROW), views(NARROW))
