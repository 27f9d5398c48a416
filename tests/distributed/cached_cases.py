# SPDX-License-Identifier: Apache-2.0
"""`cached_step` on a rank, for test_cached.py: towers under DistributedDataParallel, a loss that spans the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkernels import cached_step
from sslkernels.losses import nt_xent

WIDTH = 6


class Towers(nn.Module):
    """Two views through one encoder; the temperature comes back from the forward, or the loss takes it past it."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.returned = returned

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        views = self.encoder(a), self.encoder(b)
        return (*views, self.temperature * 1.0) if self.returned else views


def towers(returned: bool) -> Towers:
    torch.manual_seed(0)
    return Towers(returned).double()


def views(rows: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    a = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return a, a + 0.3 * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


def loss_of(model: Towers, **options: Any) -> Any:
    if model.returned:
        return lambda a, b, temperature: nt_xent(a, b, temperature, **options)
    return lambda a, b: nt_xent(a, b, model.temperature, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(sizes: tuple[int, ...], returned: bool, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One graph of all rows in one process, the gradients of all steps added up."""
    model, total = towers(returned), torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        loss = loss_of(model)(*model(*views(sum(sizes), step)))
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def counted(averaged: DistributedDataParallel, group: Any) -> list[int]:
    """Where each averaging of a bucket of gradients is noted from here on."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    averages: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        averages.append(bucket.index())
        return allreduce_hook(state, bucket)

    averaged.register_comm_hook(group, hook)
    return averages


def function_step(group: Any, sizes: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor], int]:
    """As `step`, of a function that calls the wrapped encoder once a view."""
    import torch.distributed as dist

    model = towers(False)
    encoder, temperature = model.encoder, float(model.temperature)
    averaged = DistributedDataParallel(encoder, process_group=group)
    averages = counted(averaged, group)
    own = [x.split(list(sizes))[dist.get_rank(group)] for x in views(sum(sizes), 0)]
    loss = cached_step(
        lambda a, b: (averaged(a), averaged(b)),
        lambda a, b: nt_xent(a, b, temperature, process_group=group),
        *own,
        micro_batch=3,
    )
    return loss, gradients(encoder), len(averages)


def step(
    group: Any, sizes: tuple[int, ...], returned: bool, steps: int, strategy: str, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor], int]:
    """On a rank, three rows at a time: losses, gradients, and how often a bucket of gradients was averaged."""
    import torch.distributed as dist

    model, rank = towers(returned), dist.get_rank(group)
    averaged = DistributedDataParallel(model, process_group=group, **options)
    averages = counted(averaged, group)
    loss_fn = loss_of(model, process_group=group, strategy=strategy)
    total = torch.zeros((), dtype=torch.float64)
    for number in range(steps):
        own = [x.split(list(sizes))[rank] for x in views(sum(sizes), number)]
        last = number == steps - 1
        if last:
            total += cached_step(averaged, loss_fn, *own, micro_batch=3)
        else:
            with averaged.no_sync():
                total += cached_step(averaged, loss_fn, *own, micro_batch=3)
    return total, gradients(model), len(averages)


def refused(group: Any, options: dict[str, Any]) -> str:
    model = towers(False)
    averaged = DistributedDataParallel(model, process_group=group, **options)
    try:
        cached_step(averaged, loss_of(model, process_group=group), *views(5, 0), micro_batch=3)
    except ValueError as error:
        return str(error)
    return ""
