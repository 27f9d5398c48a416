# SPDX-License-Identifier: Apache-2.0
"""SigLIP and losses over frozen keys and queues, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from contract import Case
from torch import Tensor, nn

from sslkernels import losses

WIDTH = 6


class ImageText(nn.Module):
    """Two towers and SigLIP's loss of them, its scale and bias learned."""

    def __init__(self, loss: Any = losses.siglip_loss, *, weighted: bool = False) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(0.7))
        self.bias = nn.Parameter(torch.tensor(-0.5))
        self.weigh = nn.Linear(WIDTH, 1) if weighted else None
        self.loss = loss

    def forward(self, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        weight = {} if self.weigh is None else {"sample_weight": self.weigh(a).squeeze(1).sigmoid()}
        image, text = F.normalize(self.image(a), dim=1), F.normalize(self.text(b), dim=1)
        return self.loss(image, text, self.log_scale.exp(), self.bias, **weight, **options)


def image_text(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    a = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return a, a + 0.3 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


def rows_weighed(*args: Any, **options: Any) -> Tensor:
    """The mean from rows, whose gradients differ."""
    from sslkernels import distributed

    rows = losses.siglip_loss(*args, reduction="none", **options).square()
    return distributed.batch(options["process_group"], None, "rows", rows=rows).mean(rows) if options else rows.mean()


siglip = Case(ImageText, image_text)
siglip_sum = Case(lambda: ImageText(partial(losses.siglip_loss, reduction="sum")), image_text)
siglip_smoothed = Case(lambda: ImageText(partial(losses.siglip_loss, label_smoothing=0.1)), image_text)
siglip_weighted = Case(lambda: ImageText(weighted=True), image_text)
siglip_rows = Case(lambda: ImageText(rows_weighed), image_text)
