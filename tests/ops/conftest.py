# SPDX-License-Identifier: Apache-2.0
"""For the tests of ops: each instruction set, and the reference as the dispatcher calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

LEVELS = {0: "baseline", 1: "v3", 2: "v4"}


@pytest.fixture(params=LEVELS, ids=LEVELS.values())
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test with the kernels of each instruction set."""
    if not hasattr(torch.ops.sslkernels, "cpu_level"):
        pytest.skip("the CPU library is not built")
    before = torch.ops.sslkernels.cpu_level()
    torch.ops.sslkernels.set_cpu_level(request.param)
    if torch.ops.sslkernels.cpu_level() == request.param:
        yield request.param
    torch.ops.sslkernels.set_cpu_level(before)
    if before < request.param:
        pytest.skip(f"this processor does not run {LEVELS[request.param]}")


@pytest.fixture
def fallback() -> Callable[..., Any]:
    """`fallback(op, *arguments)`: what serves a device without a kernel."""

    def call(op: Any, *arguments: Any) -> Any:
        with torch.no_grad():
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *arguments)

    return call
