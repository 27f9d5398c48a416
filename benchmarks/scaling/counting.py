# SPDX-License-Identifier: Apache-2.0
"""The bytes a rank sends: what is handed to torch.distributed, at the cost of the ring algorithm of each collective.

A ring algorithm sends the least there is, and NCCL's sends as much. gloo may send more, in messages that are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from sslkernels.distributed._agreement import WORDS

EXCHANGE = 8 * WORDS  # bytes that a rank describes in what it brings


class Sent(NamedTuple):
    what: str
    bytes: float


def _all_gather(out: Tensor, x: Tensor, group: Any = None, **_: Any) -> float:
    return (dist.get_world_size(group) - 1) * x.nbytes


def _reduce_scatter(out: Tensor, x: Tensor, *_: Any, group: Any = None, **__: Any) -> float:
    return (dist.get_world_size(group) - 1) * out.nbytes


def _all_reduce(x: Tensor, *_: Any, group: Any = None, **__: Any) -> float:
    world = dist.get_world_size(group)
    return 2 * (world - 1) / world * x.nbytes


def _all_to_all(
    out: Tensor, x: Tensor, _: Any = None, sizes: list[int] | None = None, group: Any = None, **__: Any
) -> float:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = sizes or [len(x) // world] * world
    return x.nbytes // max(1, len(x)) * (sum(rows) - rows[rank])


def _swap(ops: list[Any]) -> float:
    return sum(op.tensor.nbytes for op in ops if op.op is dist.isend)


COSTS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("all_gather_single", "all_gather_into_tensor"), _all_gather),  # its name of torch 2.13, and before
    **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_tensor"), _reduce_scatter),
    "all_reduce": _all_reduce,
    "all_to_all_single": _all_to_all,
    "batch_isend_irecv": _swap,
}


@contextmanager
def counted() -> Iterator[list[Sent]]:
    """What this process sends in the block, in order. Comparisons of what ranks bring are told apart, as "agree"."""
    found: list[Sent] = []

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            agreement = COSTS[name] is _all_gather and arguments[1].nbytes == EXCHANGE
            found.append(Sent("agree" if agreement else name, COSTS[name](*arguments, **options)))
            return call(*arguments, **options)

        return wrapped

    with ExitStack() as stack:
        for name in (name for name in COSTS if hasattr(dist, name)):
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield found


def total(found: list[Sent], *, agreement: bool = False) -> float:
    return sum(sent.bytes for sent in found if (sent.what == "agree") == agreement)
