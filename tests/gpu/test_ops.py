# SPDX-License-Identifier: Apache-2.0
"""Every op on a GPU: against float64, twice the same, without a wait for the device, captured, on any stream."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gpu_calls import CALLS, leaves_of
from masks_cases import CALLS as MASK_CALLS
from torch import Tensor

from sslkernels import ops

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of the value and of a gradient, relative by norm: the library's numeric contract
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2)}
MASKS = {name: call for name, call in MASK_CALLS.items() if not name.startswith("multiblock")}
NAMES = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def no_sync() -> Iterator[None]:
    """A wait for the device is an error; switched on by the test, after its warm-up."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = (x.to_dense() if x.is_sparse else x for x in (found, expected))
    assert found.shape == expected.shape
    wide = found.detach().cpu().double()
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.cpu(), expected) else math.inf
    assert torch.equal(wide.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    return ((wide - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-30)).item()


def same(a: Tensor, b: Tensor) -> bool:
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@NAMES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    values, gradients = call.step(call.inputs(dtype, "cuda"))
    exact_values, exact_gradients = call.step(call.inputs(dtype, "cpu", wide=True))
    value_bound, gradient_bound = (0.0, 0.0) if call.exact else BOUNDS[dtype]
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
        assert same(a, b)


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
        assert same(a, b)


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
        assert same(a, b)


@NAMES
def test_runs_on_another_device(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call = CALLS[name]
    first, second = (call.step(call.inputs(torch.bfloat16, device)) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert b.device.index == 1
        assert same(a.cpu(), b.cpu())


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


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_captured_in_a_graph(name: str) -> None:
    """A seed tensor on the device: a replay draws by the seed that is there then."""
    call = MASKS[name]
    moved = {key: x.cuda() for key, x in call.kwargs.items() if isinstance(x, Tensor)}
    place = moved or {"device": "cuda"}
    seed = torch.tensor(5, device="cuda")
    call.tensors(seed=seed, **place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.tensors(seed=seed, **place)
    seed.fill_(9)
    graph.replay()
    for a, b in zip(captured, call.tensors(seed=torch.tensor(9, device="cuda"), **place), strict=True):
        assert torch.equal(a, b)


def test_a_mask_of_the_host_is_not_captured() -> None:
    with pytest.raises(RuntimeError, match="drawn on the host"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.multiblock_mask(4, (14, 14), seed=3, device="cuda")


def test_queues_and_averages_are_captured_in_a_graph() -> None:
    queue, pointer = torch.zeros(8, 4, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    target, source = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda")
    keys = torch.ones(3, 4, device="cuda")
    ops.enqueue_(queue, pointer, keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.enqueue_(queue, pointer, keys)
        ops.ema_update_([target], [source], 0.5)
    pointer.fill_(6)
    queue.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert pointer.item() == 1 and queue.sum(1).tolist() == [4, 0, 0, 0, 0, 0, 4, 4]
    assert target[0].item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Features meet in 16 bits, the loss is float32, gradients come in the dtype of their leaves."""
    from sslkernels import losses

    torch.manual_seed(0)
    x, y = (torch.randn(200, 64, device="cuda", requires_grad=True) for _ in range(2))
    with torch.autocast("cuda", dtype):
        loss = losses.nt_xent(x, y, 0.2)
    found = torch.autograd.grad(loss, (x, y))
    a, b = (z.detach().double().cpu().requires_grad_() for z in (x, y))
    expected = losses.nt_xent(a, b, 0.2)
    exact = torch.autograd.grad(expected, (a, b))
    assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) <= 1e-2 * expected.item()
    for g, true in zip(found, exact, strict=True):
        assert g.dtype == torch.float32 and error(g, true) <= 2e-2


def test_every_op_has_a_kernel() -> None:
    """What serves a GPU; the ops named here have none, and docs/gpu.md says why."""
    from sslkernels import info
    from sslkernels.ops._registry import OPS

    without = {name for name in OPS if info.serves(name, "cuda") == "reference"}
    assert without == {"skipgram_update_", "multiblock_mask", "multiblock3d_mask"}
