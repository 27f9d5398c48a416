# SPDX-License-Identifier: Apache-2.0
"""For every test: seeds, poisoned fresh memory, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest
import torch

M_PERTURB = -6  # of mallopt(3)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run in Python, on CPU tensors


def pytest_configure(config: pytest.Config) -> None:
    """Fresh memory never looks like a result, so an element that nobody wrote shows.

    Tensors that torch makes, for C++ kernels too, hold NaN (integers their largest value). Memory from malloc holds
    0x7f7f7f7f, 3.4e38 as a float32, in glibc; elsewhere it is left alone.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_PERTURB, 0x80)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
