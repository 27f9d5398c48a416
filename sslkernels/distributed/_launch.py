# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def place() -> tuple[int, int] | None:
    """(rank, number of processes) as torchrun told them; None where it did not start this one.

    Schedulers set WORLD_SIZE alone, or RANK alone, for other purposes: both are needed.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def launched() -> Iterator[str | None]:
    """The `process_group=` of what torchrun started: "world", a gloo group for as long as the context; else None."""
    import torch.distributed as dist

    found = place()
    if found is None or found[1] == 1 or not dist.is_available():
        yield None
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")
    try:
        yield "world"
    finally:
        if mine:
            dist.destroy_process_group()
