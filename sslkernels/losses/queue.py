# SPDX-License-Identifier: Apache-2.0
"""MoCo's queue of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed._group import span
from sslkernels.losses._module import shown_span
from sslkernels.ops import enqueue_

DRAWN = 1 << 16  # first rows at a time, so that a queue of many gigabytes is not made in float32 first


class MemoryQueue(nn.Module):
    """Ring buffer of the last `size` keys, in the module's state_dict.

        keys[(pointer + j) % size] = new_keys[j]        for each j in order
        pointer = (pointer + len(new_keys)) % size

    It starts with random unit rows, as MoCo's. Keys are stored as they come: normalise them first. The losses do not
    save frozen keys, so enqueueing between a forward that read `keys` and its backward is legal.

    Over several ranks every rank enqueues the keys of all, in the order of the ranks: all hold the same. `sharded`
    instead shares the queue out: each rank has size / R rows and enqueues its own keys, which no rank sends anywhere;
    `info_nce(..., sharded_negatives=True)` takes the queries to them. A shard is no buffer of the module, as
    DistributedDataParallel would overwrite it by rank 0's, but it is in the state_dict: each rank saves and loads its
    own. 100 million keys of 128 bfloat16 numbers are 25.6 GB, and 3.2 GB on each of 8 ranks.

    Source: facebookresearch/moco `moco/builder.py::MoCo._dequeue_and_enqueue`; here any batch size is.

    Args:
        size: number of keys, of all shards together.
        dim: width of a key.
        dtype: of the storage; 16 bits halve the memory.
        generator: of the first rows. Without it ranks draw from a seed of their own: the same for all, but for shards.
        process_group: as in `distributed.Group`, the ranks whose keys are enqueued.
        sharded: whether each rank holds a part.

    Buffers:
        keys: (size, dim), or (size / R, dim).
        pointer: where the next key goes, int64, ().

    Raises:
        ValueError, TypeError: size or dim not positive, a dtype that is not floating, keys of another width; a size
            that the ranks cannot share evenly.
        RuntimeError: a shard in a group of another size, as one that is made before `init_process_group`.

    Example:
        >>> queue = MemoryQueue(1024, 128)
        >>> queue(torch.nn.functional.normalize(torch.randn(256, 128), dim=1))
        >>> int(queue.pointer)
        256
    """

    keys: Tensor
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        *,
        generator: torch.Generator | None = None,
        process_group: Any = None,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        for name, x in (("size", size), ("dim", dim)):
            if isinstance(x, bool) or not isinstance(x, int):
                raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
            if x < 1:
                raise ValueError(f"{name} must be positive, got {x}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        _, rank, world, *_ = span(process_group)
        if sharded and size % world:
            raise ValueError(f"size must be a multiple of the {world} ranks that share the queue, got {size}")
        self.size, self.process_group, self.sharded, self.world = size, process_group, sharded, world
        if process_group is not None and generator is None:
            generator = torch.Generator().manual_seed(rank if sharded else 0)
        keys = torch.empty(size // world if sharded else size, dim, dtype=dtype)
        device = keys.device if generator is None else generator.device
        for part in keys.split(DRAWN):
            part.copy_(F.normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
        self.register_buffer("keys", keys)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        with self._registered():
            pass

    def forward(self, keys: Tensor) -> None:
        """Enqueue keys (N, dim) in place, the oldest ones give way."""
        if not self.sharded:
            keys = memory_queue(self.keys, keys, process_group=self.process_group)
        elif (world := span(self.process_group)[2]) != self.world:
            raise RuntimeError(f"queue of {self.world} shards is used by {world} ranks: it must be made in their group")
        enqueue_(self.keys, self.pointer, keys)

    @contextmanager
    def _registered(self) -> Iterator[None]:
        """Buffers inside, as whatever moves, saves or loads a module expects; outside a shard is none."""
        names = ("keys", "pointer")
        self._buffers.update({name: self.__dict__.pop(name) for name in names if name in self.__dict__})
        try:
            yield
        finally:
            if self.sharded:
                self.__dict__.update({name: self._buffers.pop(name) for name in names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryQueue:
        with self._registered():
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        with self._registered():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._registered():
            super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        shown = [f"size={self.size}, dim={self.keys.shape[1]}, dtype={self.keys.dtype}"]
        shown += shown_span({"process_group": self.process_group, "strategy": None})
        return ", ".join(shown + ["sharded=True"] * self.sharded)


@distributed.raises_together
@torch.no_grad()
def memory_queue(queue: Tensor, keys: Tensor, *, process_group: Any) -> Tensor:
    """The keys that all ranks enqueue, in the order of the ranks."""
    check.features(queue=queue, keys=keys)
    if keys.dtype.itemsize > queue.dtype.itemsize:
        keys = keys.to(queue.dtype)  # as they will be stored, and half of what is sent
    return distributed.batch(process_group, None, "MemoryQueue", keys=keys).gather(keys)
