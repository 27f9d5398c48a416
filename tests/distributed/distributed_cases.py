# SPDX-License-Identifier: Apache-2.0
"""Models whose losses span ranks, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from contract import Case
from torch import Tensor, nn

from sslkernels import losses

WIDTH = 6


class TwoViews(nn.Module):
    """Two views through one encoder, and a loss of them; temperature learned where the loss takes it."""

    def __init__(self, loss: Callable[..., Tensor], temperature: float | None = None) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.loss = loss
        self.temperature = None if temperature is None else nn.Parameter(torch.tensor(temperature))

    def forward(self, a: Tensor, b: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        learned = {} if self.temperature is None else {"temperature": self.temperature}
        return self.loss(self.encoder(a), self.encoder(b), *rest, **learned, **options)


def two_views(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    a = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return a, a + 0.3 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


nt_xent = Case(lambda: TwoViews(losses.nt_xent, 0.3), two_views)
dcl = Case(lambda: TwoViews(losses.dcl, 0.3), two_views)
