# SPDX-License-Identifier: Apache-2.0
"""Which processes a loss spans, and what they agree on before they exchange anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels import _checks as checks
from sslkernels._autocast import autocasts
from sslkernels.distributed import _agreement as agreement
from sslkernels.distributed import _collectives as collectives
from sslkernels.ops._emitted import wants_grad
from sslkernels.reference._precision import compute_dtype

STRATEGIES = ("gather", "ring", "bidirectional_ring")
CHECKS = ("step", "first")


@dataclass(frozen=True)
class Group:
    """The processes that share a batch; what `process_group=` of a loss also takes, for its options.

    Args:
        process_group: of torch.distributed; "world", the default group, or one process where there is none; None, this
            process alone.
        strategy: how features meet those of other ranks. "gather": every rank gets all of them, one collective; the
            memory grows with the world. "ring": they travel from rank to rank, the next ones on their way while those
            at hand are used; O(local batch) memory at any world size. "bidirectional_ring": both ways at once, half as
            many hops; for NT-Xent, DCL and SupCon, whose ranks go half the way anyhow, it is "ring".
        check: when the ranks compare what they bring. "step": in every call; batches may then be uneven, and a rank
            that brings another shape, dtype or option is an error on every rank. It costs one exchange of 1 KiB, and on
            a group without a backend for the CPU the host waits for the device. "first": at the first call with these
            shapes; all batches must be of one size. None: "step" where the group has a backend for the CPU (gloo; also
            the default of `init_process_group`, which has both), else "first".

    Raises:
        ValueError, TypeError: an option that is not one of those; a group this process is not in.

    Example:
        >>> from sslkernels.losses import nt_xent
        >>> group = Group("world", strategy="ring")
        >>> loss = nt_xent(torch.randn(8, 16), torch.randn(8, 16), process_group=group)
    """

    process_group: Any = None
    strategy: str = "gather"
    check: str | None = None

    def __post_init__(self) -> None:
        checks.choice("strategy", self.strategy, STRATEGIES)
        if self.check is not None:
            checks.choice("check", self.check, CHECKS)
        if isinstance(self.process_group, str) and self.process_group != "world":
            raise ValueError(f"process_group must be a ProcessGroup, 'world' or None, got {self.process_group!r}")


class Batch(NamedTuple):  # which a call makes at once: a frozen dataclass takes 2 us
    """The rows of one call over all ranks. Every loss makes one and hands it to whatever looks beyond its own rows.

    name: of the group, for the ops; "" is this process alone. rows: those of this rank. sizes: (world,) int64 on the
    CPU, the rows of each rank; None where all have as many as this one.
    """

    name: str
    rank: int
    world: int
    strategy: str
    rows: int
    sizes: Tensor | None

    @property
    def local(self) -> bool:
        return self.world == 1

    def total(self, like: Tensor) -> Tensor | int:
        """Rows of all ranks: a number; while a compiler traces and sizes may differ, a 0-D tensor beside `like`."""
        if self.sizes is None:
            return self.rows * self.world
        total = self.sizes.sum()
        if checks.readable(total):
            return int(total)  # of the CPU: no device is waited for
        return total.to(like.device, compute_dtype(like))

    def sizes_of(self, x: Tensor) -> Tensor | None:
        """The rows of x on each rank, where it has a multiple of the batch's: two views stacked, say."""
        return None if self.sizes is None else self.sizes * (x.shape[0] // self.rows if self.rows else 1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, elementwise; the gradient is that of the sum of all ranks' losses."""
        return x if self.local else collectives.all_sum(x, self.name)

    def shared(self, x: Tensor) -> Tensor:
        """x, computed alike on all ranks from sums without a gradient; its own is the sum of what the ranks have."""
        return x if self.local else collectives.shared(x, self.name)

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, elementwise, of what has no gradient and no NaN that matters."""
        return x if self.local else collectives.all_max(x, self.name)

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks below each other; the gradient returns summed, in float32 at least."""
        return x if self.local else collectives.gather_rows(x, self.sizes_of(x), self.world, self.name)

    def own(self, x: Tensor) -> Tensor:
        """The part of this rank in something that has a row for each of the batch's."""
        if self.local:
            return x
        if self.sizes is None:
            return x.narrow(0, self.rank * self.rows, self.rows)
        return x.index_select(0, self.sizes[: self.rank].sum() + torch.arange(self.rows, device=x.device))

    def mean(self, rows: Tensor, dim: int = -1) -> Tensor:
        """What this rank returns for a mean over the rows of all ranks: the mean of it over the ranks is that."""
        if self.local:
            return rows.mean(dim)
        return rows.sum(dim) * (self.world / self.total(rows))

    def weigh(self, mean: Tensor) -> Tensor:
        """What this rank returns for a mean over the rows of all ranks, from the mean over its own."""
        return mean if self.sizes is None else mean * (self.rows * self.world / self.total(mean))


def alone(x: Tensor) -> Batch:
    """The rows of x in this process, and no others."""
    return Batch("", 0, 1, STRATEGIES[0], x.shape[0], None)


def span(process_group: Any, strategy: str | None = None) -> tuple[str, int, int, str, str]:
    """Name, rank, world, strategy and check of a `process_group=` argument; the name of a single process is ""."""
    group = process_group if isinstance(process_group, Group) else Group(process_group, strategy or "gather")
    if strategy is not None:
        checks.choice("strategy", strategy, STRATEGIES)
    handle = group.process_group
    if handle is None:
        return "", 0, 1, group.strategy, "first"
    import torch.distributed as dist

    if isinstance(handle, str):
        if not (dist.is_available() and dist.is_initialized()):
            return "", 0, 1, group.strategy, "first"
        handle = dist.group.WORLD
    if not isinstance(handle, dist.ProcessGroup):
        if handle is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be a group that this process is in")
        raise TypeError(f"process_group must be a ProcessGroup, 'world' or None, got {type(handle).__name__}")
    rank, world = dist.get_rank(handle), dist.get_world_size(handle)
    if world == 1:
        return "", 0, 1, group.strategy, "first"
    check = group.check or ("step" if collectives.has_cpu_backend(handle.group_name) else "first")
    return handle.group_name, rank, world, strategy or group.strategy, check


def batch(process_group: Any, strategy: str | None, loss: str, /, **brought: Any) -> Batch:
    """The global batch of a loss: checks that all ranks call it with the same arguments, but for their rows.

    brought: by the names that the user knows; the first is a tensor (rows, ...). Tensors are the same but for their
    first dimension, which is the same on all ranks or in step with the rows; numbers, strings, bools and None are the
    same; of anything else its type is.
    """
    first = next(iter(brought.values()))
    if process_group is None and strategy is None:
        return alone(first)
    name, rank, world, strategy, check = span(process_group, strategy)
    rows = first.shape[0]
    if world == 1:
        return Batch(name, rank, world, strategy, rows, None)
    tensors = {key: x for key, x in brought.items() if isinstance(x, Tensor)}
    numbers = {key: float(x) for key, x in brought.items() if _is_number(x)}
    cast = str(torch.get_autocast_dtype(first.device.type)) if autocasts(first) else None
    options = {"strategy": strategy, "check": check, "autocast": cast, **brought}
    lines = [f"{key}={_shown(x)}" for key, x in options.items() if key not in tensors and key not in numbers]
    what = "\n".join([f"loss={loss}", *lines])
    xs, names, values = list(tensors.values()), [*tensors, *numbers], list(numbers.values())
    sizes = None
    if check == "step":
        sizes = agreement.agree(xs, wants_grad(*xs), what, names, values, world, name)
    elif not torch.compiler.is_compiling():
        agreement.agree_once(xs, what, names, values, world, name)
    return Batch(name, rank, world, strategy, rows, sizes)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | torch.SymInt | torch.SymFloat) and not isinstance(x, bool)


def _shown(x: Any) -> str:
    return repr(x) if x is None or isinstance(x, bool | str) else f"a {type(x).__name__}"
