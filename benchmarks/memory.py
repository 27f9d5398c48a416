# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step, from the kernel's high-water mark of this process.

Run in a fresh process whose allocator hands freed blocks back at once (`ENVIRONMENT`), or blocks that the warm-up
left behind would hide what the step needs. It repeats within 0.5 MiB; less than 1 MiB is not told apart from nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MIB = 2**20


def status_bytes(key: str, status: str) -> int:
    """A field such as VmHWM of the text of /proc/self/status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)
    if not found:
        raise ValueError(f"/proc/self/status: expected a line {key}, got none (Linux only)")
    return int(found.group(1)) * 1024


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def above(peak: int, before: int, gradients: int) -> float:
    """MiB that the step needed beyond what was there before it (inputs included) and its leaf gradients."""
    return max(0.0, (peak - before - gradients) / MIB)


def reset_peak() -> int:
    """Give free memory back, reset the high-water mark, and return the bytes resident now."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS", Path("/proc/self/status").read_text())


def peak_mib(step: Callable[[], Iterable[Tensor]]) -> float:
    """Run `step`, which returns the leaf gradients, and return its extra peak memory in MiB."""
    before = reset_peak()
    gradients = tensor_bytes(step())
    return above(status_bytes("VmHWM", Path("/proc/self/status").read_text()), before, gradients)
