# SPDX-License-Identifier: Apache-2.0
"""What a rank allocates while it computes a loss and its gradients, and what it finds alone in a group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from sslkernels import losses

ROWS, WIDTH = 160, 1024  # a kernel packs up to 512 rows at a time, and scores are to be less than features


LOSSES: dict[str, Any] = {
    "nt_xent": losses.nt_xent,
    "dcl": losses.dcl,
    "info_nce": losses.info_nce,
    "clip_loss": lambda a, b, **options: losses.clip_loss(a, b, 0.1, **options),
    "siglip_loss": lambda a, b, **options: losses.siglip_loss(a, b, 0.1, **options),
    "siglip_loss, weights learned": lambda a, b, **options: losses.siglip_loss(
        a, b, 0.1, sample_weight=a[:, 0].sigmoid(), **options
    ),
    "frozen keys": lambda a, b, **options: losses.info_nce(a, b.detach(), **options),
    "shards": lambda a, b, **options: losses.info_nce(a, b, b.detach(), sharded_negatives=True, **options),
    "supcon": lambda a, b, **options: losses.supcon(
        torch.stack([a, b], 1), torch.arange(len(a)) % ROWS // 9, **options
    ),
}


def _allocations(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """Bytes that a call takes, positive, and gives back, in their order; and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events: Any = profiler.profiler
    found = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())], result


def largest_tensor(group: Any, name: str, strategy: str) -> float:
    """The largest tensor that forward and backward make, in rows of the features."""
    views = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
    taken, _ = _allocations(lambda: LOSSES[name](*views, process_group=group, strategy=strategy).backward())
    return max(taken) / (4 * WIDTH)


def peaks(group: Any, name: str, strategy: str) -> list[int]:
    """The most bytes that a forward, and a backward, has alive; features are narrow, so that a number a row counts."""
    views = [torch.randn(ROWS, 8, requires_grad=True) for _ in range(2)]
    forward, loss = _allocations(lambda: LOSSES[name](*views, process_group=group, strategy=strategy))
    backward, _ = _allocations(loss.backward)
    return [max(accumulate(taken)) for taken in (forward, backward)]


def group_of_one(group: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss on a group of this rank alone, and without a group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    views = [torch.randn(ROWS, 3) for _ in range(2)]
    return LOSSES[name](*views, process_group=groups[dist.get_rank()]), LOSSES[name](*views)


def statistics(group: Any, name: str, strategy: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The means over the ranks of what `return_stats` tells, and of one process on all rows."""
    generator = torch.Generator().manual_seed(0)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    views = [torch.randn(world * ROWS, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    call: Any = partial(LOSSES[name], return_stats=True)
    own = call(*(x.chunk(world)[rank] for x in views), process_group=group, strategy=strategy)[1]
    for x in own.values():
        dist.all_reduce(x, group=group)
        x /= world
    return own, call(*views)[1]
