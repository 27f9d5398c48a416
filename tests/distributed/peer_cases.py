# SPDX-License-Identifier: Apache-2.0
"""What other libraries compute on several ranks, restated; lightly's own classes where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contract import Case
from distributed_cases import TwoTowers, TwoViews, two_views
from torch import Tensor

from sslkernels import losses

TEMPERATURE = 0.3


class Gathered(torch.autograd.Function):
    """The rows of all ranks of the default group, with the gradient of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return without_gradient(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def without_gradient(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def lightly_rows(a: Tensor, b: Tensor, gathered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit rows of both views, logits of the own rows against all of both, and which are themselves and partners."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    all_a, all_b = (Gathered.apply(x) for x in (a, b)) if gathered else (a, b)
    s = torch.cat([a, b]) @ torch.cat([all_a, all_b]).T / TEMPERATURE
    place = torch.arange(len(a)) + (dist.get_rank() * len(a) if gathered else 0)
    own, partner = torch.cat([place, place + len(all_a)]), torch.cat([place + len(all_a), place])
    return a, b, s, own[:, None], partner[:, None]


def lightly_nt_xent(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    _, _, s, own, partner = lightly_rows(a, b, bool(options))
    return F.cross_entropy(s.scatter(1, own, -torch.inf), partner.squeeze(1))


def lightly_dcl(a: Tensor, b: Tensor, weight_fn: Callable[..., Tensor] | None = None, **options: Any) -> Tensor:
    """Positives weighted among the own rows alone."""
    a, b, s, own, partner = lightly_rows(a, b, bool(options))
    weight = 1.0 if weight_fn is None else torch.cat([weight_fn(a, b), weight_fn(b, a)])
    lse = s.scatter(1, own, -torch.inf).scatter(1, partner, -torch.inf).logsumexp(1)
    return (lse - weight * s.gather(1, partner).squeeze(1)).mean()


def lightly_itself(name: str, **arguments: Any) -> Callable[..., Tensor]:
    import lightly.loss  # type: ignore[import-not-found,unused-ignore]

    def call(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        loss: Tensor = getattr(lightly.loss, name)(TEMPERATURE, gather_distributed=bool(options), **arguments)(a, b)
        return loss

    return call


def open_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, local: bool, grad: bool, **options: Any) -> Any:
    """local and grad: the flags local_loss and gather_with_grad."""
    if "process_group" not in options:
        return losses.clip_loss(image, text, scale)
    n, rank = len(image), dist.get_rank()
    images, texts = (Gathered.apply(x) if grad else without_gradient(x) for x in (image, text))
    if not (grad or local):  # the own rows among the others with their gradient
        images, texts = (
            torch.cat([everything[: rank * n], x, everything[(rank + 1) * n :]])
            for everything, x in ((images, image), (texts, text))
        )
    if local:
        s, t, labels = scale * image @ texts.T, scale * text @ images.T, torch.arange(n) + rank * n
    else:
        s, labels = scale * images @ texts.T, torch.arange(len(images))
        t = s.T
    return (F.cross_entropy(s, labels) + F.cross_entropy(t, labels)) / 2 + 0.0 * bias


def views(loss: Callable[..., Tensor]) -> Case:
    return Case(lambda: TwoViews(loss), two_views)


def towers(loss: Callable[..., Tensor]) -> Case:
    return Case(lambda: TwoTowers(lambda *args, sample_weight=None, **options: loss(*args, **options)), two_views)


nt_xent = views(lightly_nt_xent)
dcl = views(lightly_dcl)
dclw = views(partial(lightly_dcl, weight_fn=losses.mises_fisher_weights))
nt_xent_itself = Case(lambda: TwoViews(lightly_itself("NTXentLoss")), two_views)
dcl_itself = Case(lambda: TwoViews(lightly_itself("DCLLoss")), two_views)
dclw_itself = Case(lambda: TwoViews(lightly_itself("DCLWLoss")), two_views)
open_clip_00 = towers(partial(open_clip, local=False, grad=False))
open_clip_01 = towers(partial(open_clip, local=False, grad=True))
open_clip_10 = towers(partial(open_clip, local=True, grad=False))
open_clip_11 = towers(partial(open_clip, local=True, grad=True))
