# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of enqueue_, thread by thread on the CPU, against the reference. No GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.reference import ema as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def check(emulated: Callable, queue: Tensor, start: int, keys: Tensor) -> None:
    expected, end, pointer = queue.clone(), torch.tensor(start), torch.tensor(start)
    reference.enqueue_(expected, end, keys)
    emulated("enqueue_", queue, pointer, keys)
    assert same(queue, expected) and torch.equal(pointer, end)


@pytest.mark.parametrize("count", [0, 1, 3, 10, 11, 25])
@pytest.mark.parametrize("start", [0, 8, 9])
def test_ring(emulated: Callable, count: int, start: int) -> None:
    for dim in (0, 1, 5, 8):  # 8: whole vectors
        check(emulated, torch.randn(10, dim), start, torch.randn(count, dim))


@pytest.mark.parametrize("given", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kept", DTYPES, ids=lambda x: str(x)[6:])
def test_dtypes(emulated: Callable, kept: torch.dtype, given: torch.dtype) -> None:
    keys = torch.tensor([[torch.nan, torch.inf, -0.0, 1e30, 65519.0, 1e-8, 1 + 2**-8, 1 + 2**-11]] * 4).to(given)
    for keys_ in (keys, torch.randn(4, 40).to(given)):
        check(emulated, torch.randn(6, keys_.shape[1]).to(kept), 4, keys_)


def test_strides(emulated: Callable) -> None:
    keys = torch.randn(7, 40)
    wide = [torch.randn(16, 6).t(), torch.randn(6, 40)[:, 2:34:2], torch.randn(6, 17)[:, 1:], torch.randn(12, 16)[::2]]
    for queue in wide:
        for given in (keys[:, :32:2], keys[:, 1:17], keys[:, :16], torch.randn(16, 7).t(), keys[:1, :16].expand(7, 16)):
            memory = queue.clone(memory_format=torch.preserve_format)
            check(emulated, queue, 3, given)
            check(emulated, memory.bfloat16(), 3, given)


def test_many_rounds(emulated: Callable) -> None:
    """A captured step calls it again and again: the pointer goes on from where it is."""
    queue, pointer = torch.randn(10, 4), torch.tensor(7)
    expected, end = queue.clone(), pointer.clone()
    for _ in range(9):
        keys = torch.randn(4, 4)
        emulated("enqueue_", queue, pointer, keys)
        reference.enqueue_(expected, end, keys)
        assert torch.equal(queue, expected) and torch.equal(pointer, end)


@pytest.mark.parametrize("start", [-1, 10, -(2**63), 2**63 - 1])
def test_invalid_pointer_writes_nothing(emulated: Callable, start: int) -> None:
    queue, pointer = torch.zeros(10, 4), torch.tensor(start)
    emulated("enqueue_", queue, pointer, torch.ones(3, 4))
    assert not queue.any() and int(pointer) == start
