# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def launched() -> Iterator[str | None]:
    """The `process_group=` of what torchrun started: "world", a gloo group for as long as the context; else None."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
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
