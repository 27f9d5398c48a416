# SPDX-License-Identifier: Apache-2.0
"""Every launch of a Triton kernel passes here: its shape comes from one table, and it can be recorded, not run."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.triton._shapes import SHAPES


class Call(NamedTuple):
    kernel: Any
    arguments: tuple
    constants: dict[str, Any]


_recorded: list[Call] | None = None
_assumed: str | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants); an empty grid launches nothing."""
    if _recorded is not None:
        _recorded.append(Call(kernel, arguments, constants))
    elif 0 not in grid:
        kernel[grid](*arguments, **constants)


def shape(kind: str, *operands: Tensor) -> dict[str, int]:
    """Tile sizes, `num_warps` and `num_stages` of a kind of kernel: from the table, by architecture and operands.

    bfloat16 beside float16 meets in float32, and takes its tiles.
    """
    row = SHAPES[architecture(operands[0])][kind]
    if not isinstance(next(iter(row)), int):
        return row
    return row[max(x.element_size() for x in operands) if len({x.dtype for x in operands}) == 1 else 4]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own, made for kernels too, costs the processor some microseconds."""
    return -(-a // b)


def architecture(x: Tensor) -> str:
    """The row of the table that serves a tensor's device."""
    return _assumed or _architecture(x.device)


def multiprocessors(x: Tensor) -> int:
    """How many programs run at once where each needs a multiprocessor."""
    if x.device.type != "cuda":
        return 132 if _assumed else 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 8.6, 8.9 and 12.0 have the shared memory that the row of 8.0 keeps to
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@contextlib.contextmanager
def record(assumed: str) -> Iterator[list[Call]]:
    """Collect the launches of what runs inside, with the shapes of an architecture; tensors may be meta tensors."""
    global _recorded, _assumed
    before = _recorded, _assumed
    calls: list[Call] = []
    _recorded, _assumed = calls, assumed
    try:
        yield calls
    finally:
        _recorded, _assumed = before
