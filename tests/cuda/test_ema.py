# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of ema_update_, thread by thread on the CPU, against the reference. No GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from sslkernels.reference import ema as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SIZES = (0, 1, 4095, 4096, 0, 4101, 0)  # 4096 elements are a block; only whole, aligned blocks take vector loads


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("seed", [None, 3, 2**63 - 1], ids=["nearest", "stochastic", "large seed"])
@pytest.mark.parametrize(("target", "source"), list(product(DTYPES, DTYPES)), ids=lambda x: str(x)[6:])
def test_bits_of_the_reference(emulated: Callable, target: torch.dtype, source: torch.dtype, seed: int | None) -> None:
    targets = [(torch.randn(n) * 10.0 ** (-i)).to(target) for i, n in enumerate(SIZES)]
    sources = [(torch.randn(n) * 10.0 ** (-i)).to(source) for i, n in enumerate(SIZES)]
    targets += [torch.tensor([torch.nan, torch.inf, 0.0, 65504.0]).to(target), torch.randn(4097).to(target)[1:]]
    sources += [torch.tensor([1.0, 1.0, torch.nan, 65519.0]).to(source), torch.randn(4096).to(source)]  # one unaligned
    drawn = None if seed is None else torch.tensor(seed)
    for momentum in (0.999, 0.25):
        expected = [x.clone() for x in targets]
        reference.ema_update_(expected, sources, momentum, drawn)
        emulated("ema_update_", targets, sources, torch.tensor(momentum, dtype=torch.float64), 0.0, drawn)
        assert all(map(same, targets, expected))


def test_more_tensors_than_one_table_holds(emulated: Callable) -> None:
    targets, sources = [torch.randn(3) for _ in range(1030)], [torch.randn(3) for _ in range(1030)]
    expected = [x.clone() for x in targets]
    reference.ema_update_(expected, sources, 0.9, None)
    emulated("ema_update_", targets, sources, None, 0.9, None)
    assert all(map(torch.equal, targets, expected))


def test_copies(emulated: Callable) -> None:
    sources = [torch.randint(-99, 99, (5000,)).to(dtype) for dtype in INTEGERS]
    targets = [torch.zeros_like(x) for x in sources]
    emulated("ema_update_", targets, sources, None, 0.9, None)
    assert all(map(torch.equal, targets, sources))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_invalid_momentum_writes_nothing(emulated: Callable, momentum: float) -> None:
    targets = [torch.zeros(9), torch.zeros(9, dtype=torch.int64)]
    emulated("ema_update_", targets, [x + 1 for x in targets], torch.tensor(momentum), 0.0, None)
    assert not any(x.any() for x in targets)
