# SPDX-License-Identifier: Apache-2.0
"""What ranks do with memory queues, for `test_queue.py`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkernels import losses
from sslkernels.distributed import _collectives as collectives
from sslkernels.losses import MemoryQueue

DIM = 4


def keys_of(sizes: Sequence[int], step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What each rank enqueues in a step."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(sum(sizes), DIM, generator=generator, dtype=dtype).split(list(sizes)))


def queue_state(queue: MemoryQueue) -> tuple[Tensor, int]:
    return queue.keys.clone(), int(queue.pointer)


def _compiled(module: nn.Module) -> Any:
    torch.compiler.reset()  # a rank that has compiled more often than others must not be the only one at a limit
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def enqueued(group: Any, size: int, dtype: torch.dtype, steps: Any, compiled: bool) -> list[tuple[Tensor, int]]:
    """The replicated queue at first and after each step."""
    torch.manual_seed(dist.get_rank())
    queue = MemoryQueue(size, DIM, dtype, process_group=group)
    call = _compiled(queue) if compiled else queue
    states = [queue_state(queue)]
    for step, sizes in enumerate(steps):
        call(keys_of(sizes, step, torch.float64)[dist.get_rank(group)])
        states.append(queue_state(queue))
    return states


def shards(group: Any, size: int, steps: Any, compiled: bool) -> list[tuple[Tensor, int]]:
    """A rank's shard at first and after each step, with a collective an error."""
    rank, guard = dist.get_rank(group), collectives.guard
    queue = MemoryQueue(size, DIM, process_group=group, sharded=True)
    call = _compiled(queue) if compiled else queue
    states = [queue_state(queue)]
    collectives.guard = None  # type: ignore[assignment]
    try:
        for step, sizes in enumerate(steps):
            call(keys_of(sizes, step)[rank])
            states.append(queue_state(queue))
    finally:
        collectives.guard = guard
    return states


class Model(nn.Module):
    def __init__(self, queue: MemoryQueue) -> None:
        super().__init__()
        self.layer, self.queue = nn.Linear(DIM, DIM), queue

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def shard_in_a_module(group: Any) -> dict[str, Any]:
    """What becomes of a shard in a module that is trained, saved, loaded, copied and moved."""
    rank = dist.get_rank(group)
    queue = MemoryQueue(8, DIM, process_group=group, sharded=True)
    expected = queue.keys.clone()
    expected[:2] = torch.tensor([[2.0], [3.0]]) + rank
    queue(torch.full((1, DIM), 2.0 + rank))
    model = DistributedDataParallel(Model(queue), process_group=group)
    queue(torch.full((1, DIM), 3.0 + rank))
    for _ in range(2):
        model(torch.ones(1, DIM)).sum().backward()
    others = [MemoryQueue(8, DIM, process_group=group, sharded=True) for _ in range(2)]
    state = Model(queue).state_dict()
    for other, assign in zip(others, (False, True)):
        Model(other).load_state_dict(state, assign=assign)
    alone = MemoryQueue(4, DIM, sharded=True)  # a process group cannot be copied
    alone.keys.copy_(expected)
    return {
        "kept": torch.equal(queue.keys, expected),
        "saved": sorted(state),
        "loaded": [torch.equal(other.keys, expected) and int(other.pointer) == 2 for other in others],
        "buffers": sum(len(list(x.buffers())) for x in (queue, *others)),
        "copied": torch.equal(copy.deepcopy(alone).keys, expected),
        "repr": repr(MemoryQueue(8, DIM, process_group="world", sharded=True)),
        "moved": [queue.half().keys.dtype, queue.pointer.dtype],
    }


def shard_elsewhere(group: Any) -> None:
    queue = MemoryQueue(8, DIM, process_group=group, sharded=True)
    queue.process_group = None
    queue(torch.ones(1, DIM))


def shard_with_a_gradient(group: Any) -> None:
    q, shard = torch.randn(2, DIM), torch.randn(4, DIM, requires_grad=dist.get_rank(group) == 1)
    losses.info_nce(q, q, shard, process_group=group, sharded_negatives=True)


class Encoder(nn.Module):
    """A queue beside the loss, or inside it."""

    def __init__(self, size: int, inside: bool, sharded: bool, group: Any, strategy: str, options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)
        self.options = {**options, "process_group": group, "strategy": strategy}
        temperature = nn.Parameter(torch.tensor(0.3))
        if inside:
            self.loss = losses.NTXentLoss(temperature, (size, DIM), shard_memory_bank=sharded, **self.options)
            self.queue = self.loss.memory_bank
            return
        self.loss = losses.InfoNCELoss(temperature, normalize=False, sharded_negatives=sharded, **self.options)
        self.queue = MemoryQueue(size, DIM, process_group=group, sharded=sharded)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a = self.layer(a)
        if isinstance(self.loss, losses.NTXentLoss):
            return self.loss(a, b)
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        loss = self.loss(a, b, self.queue.keys)
        self.queue(b)
        return loss


Call = tuple[bool, str, dict[str, Any], int, Sequence[int]]


def training(group: Any, sharded: bool, call: Call, compiled: bool = False) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of five steps; each enqueues between forward and backward. group None: one process.

    call: whether the queue is in the loss, the strategy, options, rows of the queue, and rows of each rank.
    """
    inside, strategy, options, size, sizes = call
    torch.manual_seed(0)
    model: Any = Encoder(size, inside, sharded, group, strategy, options).double()
    first = F.normalize(torch.randn(size, DIM, generator=torch.Generator().manual_seed(7), dtype=torch.float64), dim=1)
    if sharded:  # so that the shards give way to the same keys as the whole
        first = first.view(-1, len(sizes), sizes[0], DIM)[:, dist.get_rank(group)].flatten(0, 1)
    model.queue.keys.copy_(first)
    wrapped = model if group is None else DistributedDataParallel(model, process_group=group)
    if compiled:  # past DDP, whose hooks no graph takes whole
        wrapped = _compiled(model)
    outcomes = []
    for step in range(5):
        model.zero_grad()
        mine = slice(None) if group is None else slice(dist.get_rank(group), dist.get_rank(group) + 1)
        loss = wrapped(*(torch.cat(keys_of(sizes, 100 * step + view, torch.float64)[mine]) for view in (0, 1)))
        loss.backward()
        if compiled:
            for p in model.parameters():
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)
        outcomes.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    return outcomes
