# SPDX-License-Identifier: Apache-2.0
"""Models whose losses span ranks, for the tests of the contract."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from contract import Case
from torch import Tensor, nn

from sslkernels import losses
from sslkernels.distributed import Group

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


class OneSet(TwoViews):
    """Features through an encoder, and their labels."""

    def forward(self, x: Tensor, *labels: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        learned = {} if self.temperature is None else {"temperature": self.temperature}
        return self.loss(self.encoder(x), *labels, **learned, **options)


class TwoTowers(nn.Module):
    """Images and texts, their logarithmic scale and bias learned."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.5))
        self.loss = loss

    def forward(self, image: Tensor, text: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
        features = self.image(image), self.text(text)
        return self.loss(*features, self.log_scale.exp(), self.bias, sample_weight=weight, **options)


class FirstTower(nn.Module):
    """Features against others that are not trained: MoCo v3's keys, LiT's images."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder, self.loss = nn.Linear(WIDTH, WIDTH), loss

    def forward(self, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        return self.loss(self.encoder(a), b, **options)


class Table(nn.Module):
    """Features that are parameters: nothing but the loss rounds them."""

    def __init__(self, loss: Callable[..., Tensor], sets: int = 2, rows: int = 32, apart: float | None = None) -> None:
        super().__init__()
        features = torch.randn(sets, rows, WIDTH)
        if apart is not None:  # from a row that all have in common
            features = torch.randn(WIDTH) + apart * features
        self.features = nn.Parameter(features)
        self.loss = loss

    def forward(self, ids: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        return self.loss(*(x[ids] for x in self.features), *rest, **options)


class Trained(nn.Module):
    """Pairs that agree and differ from all others, as unit rows: losses near 1e-6, where the usual forms cancel."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        first = torch.randn(32, 64)
        self.a, self.b = nn.Parameter(first), nn.Parameter(first + 0.3 * torch.randn(32, 64))
        self.loss = loss

    def forward(self, ids: Tensor, **options: Any) -> Tensor:
        return self.loss(*(nn.functional.normalize(x[ids], dim=1) for x in (self.a, self.b)), **options)


def two_views(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    a = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return a, a + 0.3 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


def weighted(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return *two_views(n, generator), torch.rand(n, generator=generator, dtype=torch.float64)


def with_own_keys(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return *two_views(n, generator), torch.randn(n, 3, WIDTH, generator=generator, dtype=torch.float64)


def labelled(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Labels 0 and 1 on every rank, 2 on the first ones alone, and one of a kind: rows without a positive."""
    labels = torch.arange(n) % 2
    labels[:4:2] = 2
    labels[n // 2] = 7
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64), labels


def sorted_labels(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Each label on one rank, or on two neighbours."""
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64), torch.arange(n) // 3


def pairs(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return (torch.randn(n, 2, WIDTH, generator=generator, dtype=torch.float64),)


def ids(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return (torch.randperm(32, generator=generator)[:n],)


def every_id(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return (torch.arange(n),)


def ids_and_labels(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    return torch.randperm(32, generator=generator)[:n], torch.arange(n) % 3


def sample_weighted(loss: Callable[..., Tensor], learned: bool = False) -> Callable[..., Tensor]:
    """With a weight of each sample that is given, or has a gradient."""
    return lambda a, b, weight, **rest: loss(
        a, b, sample_weight=weight * a[:, 0].sigmoid() if learned else weight, **rest
    )


def own_share(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """From the rows of reduction="none" what reduction="sum" is, where the number of rows is the same on all ranks."""

    def total(*args: Any, **rest: Any) -> Tensor:
        group = rest.get("process_group")
        rows = loss(*args, **options, **rest, reduction="none")
        return rows.sum() * (1 if group is None else torch.distributed.get_world_size(group.process_group))

    return total


def with_stats(loss: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    return lambda *args, **rest: loss(*args, **options, **rest, return_stats=True)[0]


def strided(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The first features by columns, the second every other column of a wider tensor."""

    def call(a: Tensor, b: Tensor, *args: Any, **rest: Any) -> Tensor:
        return loss(a.T.contiguous().T, torch.stack([b, b], 2)[:, :, 0], *args, **rest)

    return call


def autocast(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def call(*args: Any, **rest: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*args, **options, **rest)

    return call


def as_module(module: nn.Module) -> Callable[..., Tensor]:
    """A loss that knows its group, as it comes back from a checkpoint or as the copy of another."""
    module = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    return lambda *args, process_group=None, strategy=None, **rest: module(*args, **rest)


def quadratic(a: Tensor, b: Tensor) -> Tensor:
    """A weight of the positives that looks at the whole batch, and has a gradient."""
    return 1.0 + 0.5 * (a * b).sum(1) - 0.1 * (a @ b.mean(0))


def queue(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def call(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
        keys = torch.linspace(-1, 1, 9 * WIDTH, dtype=a.dtype).view(9, WIDTH).cos()
        return loss(a, b, keys, **options, **rest)

    return call


nt_xent = Case(lambda: TwoViews(losses.nt_xent, 0.3), two_views)
nt_xent_smooth = Case(lambda: TwoViews(partial(losses.nt_xent, label_smoothing=0.2), 0.3), two_views)
nt_xent_hard = Case(lambda: TwoViews(partial(losses.nt_xent, beta=0.5, tau_plus=0.05), 0.3), two_views)
nt_xent_weighted = Case(lambda: TwoViews(sample_weighted(losses.nt_xent), 0.3), weighted)
nt_xent_sum = Case(lambda: TwoViews(partial(losses.nt_xent, reduction="sum"), 0.3), two_views)
nt_xent_rows = Case(lambda: TwoViews(own_share(losses.nt_xent), 0.3), two_views)
nt_xent_stats = Case(lambda: TwoViews(with_stats(losses.nt_xent), 0.3), two_views)
nt_xent_strided = Case(lambda: TwoViews(strided(losses.nt_xent), 0.3), two_views)
nt_xent_table = Case(lambda: Table(partial(losses.nt_xent, temperature=0.5)), ids)

dcl = Case(lambda: TwoViews(losses.dcl, 0.3), two_views)
dcl_weights = Case(lambda: TwoViews(partial(losses.dcl, weight_fn=quadratic), 0.3), two_views)
dclw = Case(lambda: TwoViews(partial(losses.dcl, weight_fn=losses.mises_fisher_weights), 0.3), two_views)
dcl_stats = Case(lambda: TwoViews(with_stats(losses.dcl, reduction="sum"), 0.3), two_views)
dcl_table = Case(lambda: Table(partial(losses.dcl, temperature=0.5)), ids)

info_nce = Case(lambda: TwoViews(losses.info_nce, 0.3), two_views)
info_nce_raw = Case(lambda: TwoViews(partial(losses.info_nce, normalize=False), 3.0), two_views)
info_nce_smooth = Case(lambda: TwoViews(partial(losses.info_nce, label_smoothing=0.2), 0.3), two_views)
info_nce_hard = Case(lambda: TwoViews(partial(losses.info_nce, beta=0.5, tau_plus=0.05), 0.3), two_views)
info_nce_weighted = Case(lambda: TwoViews(sample_weighted(losses.info_nce, learned=True), 0.3), weighted)
info_nce_queue = Case(lambda: TwoViews(queue(losses.info_nce, label_smoothing=0.1), 0.3), two_views)
info_nce_queue_and_batch = Case(
    lambda: TwoViews(queue(losses.info_nce, in_batch=True, tau_plus=0.05, beta=1.0), 0.3), two_views
)
info_nce_queue_weighted = Case(lambda: TwoViews(sample_weighted(queue(losses.info_nce)), 0.3), weighted)
info_nce_strided = Case(lambda: TwoViews(strided(partial(losses.info_nce, normalize=False)), 3.0), two_views)
info_nce_own = Case(lambda: TwoViews(losses.info_nce, 0.3), with_own_keys)
info_nce_own_and_batch = Case(lambda: TwoViews(partial(losses.info_nce, in_batch=True), 0.3), with_own_keys)
info_nce_frozen = Case(lambda: FirstTower(partial(losses.info_nce, beta=0.5)), two_views)
info_nce_rows = Case(lambda: TwoViews(own_share(losses.info_nce), 0.3), two_views)
info_nce_stats = Case(lambda: TwoViews(with_stats(losses.info_nce, reduction="sum"), 0.3), two_views)
info_nce_table = Case(lambda: Table(partial(losses.info_nce, temperature=0.5)), ids)

clip_loss = Case(lambda: TwoTowers(losses.clip_loss), two_views)
clip_smooth = Case(lambda: TwoTowers(partial(losses.clip_loss, label_smoothing=0.2)), two_views)
clip_weighted = Case(lambda: TwoTowers(losses.clip_loss), weighted)
clip_strided = Case(lambda: TwoTowers(strided(losses.clip_loss)), two_views)
clip_frozen = Case(lambda: FirstTower(partial(losses.clip_loss, label_smoothing=0.1, logit_scale=2.0)), two_views)
clip_rows = Case(lambda: TwoTowers(own_share(losses.clip_loss)), two_views)
clip_stats = Case(lambda: TwoTowers(with_stats(losses.clip_loss, reduction="sum")), two_views)
clip_table = Case(lambda: Table(partial(losses.clip_loss, logit_scale=0.5)), ids)
clip_alike = Case(lambda: Table(partial(losses.clip_loss, logit_scale=0.05), rows=256, apart=0.05), every_id)

supcon = Case(lambda: OneSet(losses.supcon, 0.3), labelled)
supcon_sorted = Case(lambda: OneSet(losses.supcon, 0.3), sorted_labels)
supcon_views = Case(lambda: OneSet(partial(losses.supcon, label_smoothing=0.2), 0.3), pairs)
supcon_smooth = Case(lambda: OneSet(partial(losses.supcon, label_smoothing=0.2), 0.3), labelled)
supcon_weighted = Case(
    lambda: OneSet(lambda x, y, w, **rest: losses.supcon(x, y, sample_weight=w, **rest), 0.3),
    lambda n, generator: (*labelled(n, generator), torch.rand(n, generator=generator, dtype=torch.float64)),
)
supcon_rows = Case(lambda: OneSet(own_share(losses.supcon), 0.3), labelled)
supcon_stats = Case(lambda: OneSet(with_stats(losses.supcon, reduction="sum"), 0.3), labelled)
supcon_table = Case(lambda: Table(partial(losses.supcon, temperature=0.5), sets=1), ids_and_labels)

nt_xent_trained = Case(lambda: Trained(partial(losses.nt_xent, temperature=0.05)), ids)
info_nce_trained = Case(lambda: Trained(partial(losses.info_nce, temperature=0.05)), ids)
clip_trained = Case(lambda: Trained(partial(losses.clip_loss, logit_scale=20.0)), ids)
supcon_trained = Case(
    lambda: Trained(lambda a, b, **rest: losses.supcon(torch.stack([a, b], 1), temperature=0.05, **rest)), ids
)

nt_xent_autocast = Case(lambda: Table(autocast(losses.nt_xent, temperature=0.5)), ids)
clip_autocast = Case(lambda: Table(autocast(losses.clip_loss, logit_scale=0.5)), ids)
supcon_autocast = Case(lambda: Table(autocast(losses.supcon, temperature=0.5), sets=1), ids_and_labels)

RING = Group("world", strategy="ring")
nt_xent_module = Case(lambda: TwoViews(as_module(losses.NTXentLoss(0.3, 0, True))), two_views)
dcl_module = Case(lambda: TwoViews(as_module(losses.DCLLoss(0.3, None, True))), two_views)
dclw_module = Case(lambda: TwoViews(as_module(losses.DCLWLoss(0.3, 0.5, True))), two_views)
info_nce_module = Case(
    lambda: TwoViews(as_module(losses.InfoNCELoss(0.3, process_group="world", strategy="ring"))), two_views
)
clip_module = Case(lambda: TwoTowers(as_module(losses.ClipLoss(process_group=RING))), two_views)
siglip_module = Case(lambda: TwoTowers(as_module(losses.SigLipLoss(process_group="world"))), two_views)
supcon_module = Case(lambda: OneSet(as_module(losses.SupConLoss(0.3, process_group=RING))), labelled)
