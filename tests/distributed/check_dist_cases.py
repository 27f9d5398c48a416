# SPDX-License-Identifier: Apache-2.0
"""Losses that go wrong over several processes as well-known ones do, restated in a few lines each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.audit import Encoder, Inputs
from sslkernels.losses import NTXentLoss


def gathered(x: Tensor, gradient: bool) -> list[Tensor]:
    if gradient:
        return list(torch.distributed.nn.all_gather(x))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts


class Clip(nn.Module):
    """CLIP with open_clip's flags: the loss of the own rows or of all, and gathered rows with or without gradient."""

    def __init__(self, own_rows: bool = False, gradient: bool = False, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.own_rows, self.gradient, self.rank, self.world = own_rows, gradient, rank, world_size

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        images, texts, start = image_features, text_features, 0
        if self.world > 1:
            all_images, all_texts = gathered(images, self.gradient), gathered(texts, self.gradient)
            if not (self.own_rows or self.gradient):
                all_images[self.rank], all_texts[self.rank] = images, texts
            whole = torch.cat(all_images), torch.cat(all_texts)
            if self.own_rows:
                start = self.rank * len(images)
            else:
                images, texts = whole
        else:
            whole = images, texts
        target = start + torch.arange(len(images))
        image_loss = F.cross_entropy(logit_scale * images @ whole[1].T, target)
        return (image_loss + F.cross_entropy(logit_scale * texts @ whole[0].T, target)) / 2


class Barlow(nn.Module):
    """Barlow Twins whose correlations are summed over the ranks in one of the ways that are found.

    statistics: of "own" rows or of "all". gradient: whether the sum of the correlations has one.
    """

    def __init__(self, statistics: str, gradient: bool, world_size: int = 1) -> None:
        super().__init__()
        self.statistics, self.gradient, self.world = statistics, gradient, world_size

    def mean(self, x: Tensor) -> Tensor:
        if self.statistics == "all" and self.world > 1:
            return torch.distributed.nn.all_reduce(x.mean(0)) / self.world
        return x.mean(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        centred = [x - self.mean(x) for x in (a, b)]
        unit = [x / (self.mean(x * x) + 1e-5).sqrt() for x in centred]
        c = unit[0].T @ unit[1] / (len(a) * self.world)
        if self.world > 1 and self.gradient:
            c = torch.distributed.nn.all_reduce(c)
        elif self.world > 1:
            dist.all_reduce(c)
        on = c.diagonal()
        return (on - 1).square().sum() + 0.005 * (c.square().sum() - on.square().sum())


def world_times(a: Tensor, b: Tensor) -> Tensor:
    """A mean that ranks sum where they should average."""
    loss = F.mse_loss(a, b)
    return torch.distributed.nn.all_reduce(loss) if dist.is_initialized() else loss


def moco(query: Tensor, key: Tensor) -> Tensor:
    """MoCo v3: gathered keys have no gradient, in one process either."""
    keys, start = key.detach(), 0
    if dist.is_initialized():
        start = dist.get_rank() * len(key)
        keys = torch.cat(gathered(keys, False))
    return F.cross_entropy(F.normalize(query) @ F.normalize(keys).T / 0.2, start + torch.arange(len(query)))


class Learned(nn.Module):
    """A temperature of the loss, which a rank's own batch alone gives a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = NTXentLoss(nn.Parameter(torch.tensor(0.5)), gather_distributed=True)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.loss(a, b)


class Centred(nn.Module):
    """A centre of the past batches, which the ranks do not share: wrong from the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        loss = ((a - self.center) * b).sum(1).mean()
        self.center = self.center + a.detach().mean(0)
        return loss


def fails(a: Tensor, b: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_rank() == 1:
        raise FloatingPointError("too warm")
    return F.mse_loss(a, b)


def collides(a: Tensor, b: Tensor) -> Tensor:
    """Uneven batches, gathered as if they were even: gloo ends the process."""
    return torch.cat(gathered(a, False)).sum() + b.sum() if dist.is_initialized() else a.sum() + b.sum()


def triples(rows: int, dim: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(rows, dim, generator=generator) for _ in range(3)]


def three(loss: nn.Module, encoder: Encoder, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, str]:
    return loss(encoder(a), encoder(b)) + loss(encoder(a), encoder(c)), "more"


own_inputs = Inputs(triples, three)


class Leak(nn.Module):
    """A parameter that has a gradient among other ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        loss = F.mse_loss(a, b)
        return loss + self.weight * a.detach().sum() if dist.is_initialized() else loss


def with_temperature(z: Tensor, temperature: float) -> Tensor:
    return (z / temperature).square().mean()


def with_rank(z: Tensor, rank: int, world_size: int) -> Tensor:
    assert not dist.is_initialized() or (rank, world_size) == (dist.get_rank(), dist.get_world_size())
    return z.square().mean()


def _one_view(z: Tensor) -> Tensor:
    return z.square().mean()


def makes_function() -> Callable[[Tensor], Tensor]:
    return _one_view


def named(z: Tensor, *, whole: bool) -> dict[str, Any]:
    """What a loss may return: its value, or its terms, beside metrics that no rank shares."""
    metrics = {"std": z.std().detach(), "rows": len(z)}
    both = z.square().mean(), z.abs().mean()
    if whole:
        return {"loss": sum(both), "first": both[0], **metrics}
    return {"first": both[0], "second": both[1], **metrics}


def exits(a: Tensor, b: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_rank() == 1:
        sys.exit(3)
    return world_times(a, b)


def ends(a: Tensor, b: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_rank() == 1:
        os._exit(3)
    return world_times(a, b)
