# SPDX-License-Identifier: Apache-2.0
"""Every op on a GPU: against float64, twice the same, without a wait for the device, captured, on any stream."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gpu_calls import CALLS, leaves_of
from torch import Tensor

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of the value and of a gradient, relative by norm: the library's numeric contract
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2)}
NAMES = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def no_sync() -> Iterator[None]:
    """A wait for the device is an error; switched on by the test, after its warm-up."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def error(found: Tensor, expected: Tensor) -> float:
    found = found.to_dense() if found.is_sparse else found
    assert found.shape == expected.shape
    wide = found.detach().cpu().double()
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.cpu(), expected) else math.inf
    assert torch.equal(wide.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    return ((wide - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-30)).item()


@NAMES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    values, gradients = call.step(call.inputs(dtype, "cuda"))
    exact_values, exact_gradients = call.step(call.inputs(dtype, "cpu", wide=True))
    value_bound, gradient_bound = (0.0, BOUNDS[dtype][1]) if call.exact else BOUNDS[dtype]
    for found, expected in zip(values, exact_values, strict=True):
        assert found.is_cuda
        assert error(found, expected.detach()) <= value_bound
    for found, expected in zip(gradients, exact_gradients, strict=True):
        assert error(found, expected) <= gradient_bound


@NAMES
def test_the_same_bits_again(name: str) -> None:
    call = CALLS[name]
    first, second = (call.step(call.inputs(torch.bfloat16, "cuda")) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@NAMES
def test_never_waits_for_the_device(name: str, no_sync: None) -> None:
    call = CALLS[name]
    inputs = call.inputs(torch.bfloat16, "cuda")
    call.step(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    call.step(inputs)


@NAMES
def test_is_captured_in_a_graph(name: str) -> None:
    """Replayed on new values, the graph computes what a call does."""
    call = CALLS[name]
    inputs = call.inputs(torch.bfloat16, "cuda")
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            call.step(inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.step(inputs)
    for x in leaves_of(inputs):
        x.data.mul_(0.5)
    expected = call.step(inputs)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([*captured[0], *captured[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@NAMES
def test_runs_on_the_current_stream(name: str) -> None:
    """Behind a long wait on the same stream: on another one the kernels would read the inputs before they are there."""
    call = CALLS[name]
    inputs = call.inputs(torch.bfloat16, "cuda")
    expected = call.step(inputs)
    kept = [x.detach().clone() for x in leaves_of(inputs)]
    aside = torch.cuda.Stream()
    for x in leaves_of(inputs):
        x.data.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(leaves_of(inputs), kept):
            x.data.copy_(value)
        found = call.step(inputs)
    torch.cuda.synchronize()
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@NAMES
def test_runs_on_another_device(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call = CALLS[name]
    first, second = (call.step(call.inputs(torch.bfloat16, device)) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert b.device.index == 1
        assert torch.equal(a.cpu().nan_to_num(0), b.cpu().nan_to_num(0))


@pytest.mark.parametrize(
    "name",
    ["similarity_logsumexp", "two_view_cross_entropy", "two_view_correlation batch", "soft_cross_entropy rows",
     "gather_patches", "masked_patch_loss", "masked_regression", "linear_cross_entropy"],
)  # fmt: skip
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    call = CALLS[name]
    inputs = call.inputs(torch.bfloat16, "cuda")
    eager = call.run(**inputs)
    compiled = torch.compile(call.run, fullgraph=True)(**inputs)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (eager, compiled)), strict=True):
        assert torch.equal(a, b)


def test_every_op_has_a_kernel() -> None:
    """What serves a GPU; the ops named here have none, and docs/gpu.md says why."""
    from sslkernels import info
    from sslkernels.ops._registry import OPS

    without = {name for name in OPS if info.serves(name, "cuda") == "reference"}
    assert without == {"skipgram_update_", "multiblock_mask", "multiblock3d_mask"}
