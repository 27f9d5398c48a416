# SPDX-License-Identifier: Apache-2.0
"""A collective that fails, since a rank died or hangs: each of the others finds out which one, and says so.

Ranks meet over the group's store, which outlives its connections: each that fails leaves an answer there, and waits for
those of the others. With gloo it first closes its connections, so that ranks which wait for this one, and not for the
dead one, fail as well, at once and not after the timeout; the group is past use by then.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

GRACE = 10.0  # seconds that others have to answer in, no more than half of the group's timeout
UNUSED_TAG = 2**31 - 1  # of messages: nothing is received by it


@contextmanager
def guard(group: Any) -> Iterator[None]:
    """Around calls of torch.distributed that fail when a rank of the group is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(_diagnose(group, str(error).split("\n")[0])) from error


class Work:
    """A collective under way, whose failure is told as `guard` does."""

    def __init__(self, work: Any, group: Any) -> None:
        self.work, self.group = work, group

    def wait(self) -> None:
        with guard(self.group):
            self.work.wait()


def _diagnose(group, error: str) -> str:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_process_group_store

    me, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    grace = min(GRACE, _close(group) / 2)
    here = f"Rank {ranks[me]} failed with: {error}"
    try:
        store = _get_process_group_store(group)
        # counted where the group is, not here: its name may have been that of another, of other processes
        prefix = f"sslkernels/fault{store.add(f'sslkernels/faults/{me}', 1)}"
        order = store.add(f"{prefix}/failed", 1)
        store.set(f"{prefix}/{me}", f"{order:06} {error}")
        answers = _answers(store, [f"{prefix}/{rank}" for rank in range(len(ranks))], grace)
    except RuntimeError:
        return (
            "ranks of a distributed loss lost each other, and the group's store does not answer: the process that holds"
            f" it, rank 0 unless a launcher does, has died or hangs. {here}"
        )
    missing = [str(rank) for rank, answer in zip(ranks, answers) if answer is None]
    if missing:
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"
        return (
            f"{who} did not answer within {grace:g} s of a failed collective of a distributed loss: dead, hanging, or"
            f" gone with an error of its own. {here}"
        )
    first = min(range(len(ranks)), key=lambda rank: answers[rank])
    return f"a distributed loss failed, first on rank {ranks[first]}: {answers[first][7:]}. {here}"


def _answers(store, keys: Sequence[str], grace: float) -> list[Any]:
    deadline = time.monotonic() + grace
    while not (everybody := store.check(list(keys))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [store.get(key).decode() if everybody or store.check([key]) else None for key in keys]


def _close(group) -> float:
    """Close the connections of a group on gloo; its timeout in seconds."""
    cpu = torch.device("cpu")
    if cpu not in group._device_types:
        return 2 * GRACE
    backend = group._get_backend(cpu)
    if backend.name() == "gloo":
        with suppress(RuntimeError):
            # what gloo does to all of a group's connections where a receipt is not in time
            backend.recv_anysource([torch.empty(1)], UNUSED_TAG).wait(timedelta(milliseconds=1))
    return backend.options._timeout.total_seconds()
