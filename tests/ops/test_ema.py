# SPDX-License-Identifier: Apache-2.0
"""ema_update_ against its definition in float64, for every pair of dtypes; what it refuses; what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkernels.ops.ema import _ema_update_, ema_update_
from sslkernels.reference import ema as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PAIRS = list(product(DTYPES, DTYPES))
# 4096 elements are one block of the CUDA kernel; 3 x 5 is not divisible by its vector width
SHAPES = [(), (1,), (3, 5), (0, 4), (4096,), (4097,), (2, 3, 4, 4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def lists(target: torch.dtype, source: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.randn(shape, dtype=target, device=device) for shape in SHAPES],
        [torch.randn(shape, dtype=source, device=device) for shape in SHAPES],
    )


def check(targets: list[Tensor], sources: list[Tensor], momentum: Tensor | float, value: float) -> None:
    """One update is the formula in float64, up to the rounding of the arithmetic and of the storage."""
    expected = [value * t.double() + (1 - value) * s.double() for t, s in zip(targets, sources, strict=True)]
    sizes = [t.double().abs() + s.double().abs() for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, momentum)
    for target, source, exact, size in zip(targets, sources, expected, sizes, strict=True):
        wide = torch.float64 in (target.dtype, source.dtype)
        arithmetic = 4 * torch.finfo(torch.float64 if wide else torch.float32).eps * size
        storage = torch.finfo(target.dtype).eps * exact.abs() + torch.finfo(target.dtype).tiny
        assert ((target.double() - exact).abs() <= arithmetic + storage).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("target", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_matches_the_definition(target: torch.dtype, source: torch.dtype, device: str) -> None:
    check(*lists(target, source, device), 0.9, 0.9)


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_list(device: str) -> None:
    both = [lists(*pair, device) for pair in PAIRS]
    check([t for targets, _ in both for t in targets], [s for _, sources in both for s in sources], 0.3, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 128, 129, 1024, 1025])
def test_launches_of_every_size(count: int) -> None:
    targets = [torch.randn(i % 7 * 1000 + 1, device="cuda") for i in range(count)]
    check(targets, [torch.randn_like(t) for t in targets], 0.9, 0.9)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    target, source = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda")
    momentum = torch.tensor(0.5, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_([target], [source], momentum)
    graph.replay()
    momentum.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(target, torch.full_like(target, 0.875))


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [math.nan, -0.1, 1.1])
def test_invalid_momentum_on_the_device_writes_nothing(momentum: float) -> None:
    target = torch.randn(10, device="cuda")
    before = target.clone()
    ema_update_([target], [torch.randn_like(target)], torch.tensor(momentum, device="cuda"))
    assert torch.equal(target, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_momentum_may_be_a_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    momentum = torch.full(shape, 0.75, dtype=dtype, device=device)
    check(*lists(torch.float32, torch.float32, device), momentum, 0.75)
    check(*lists(torch.float32, torch.bfloat16, device), momentum, 0.75)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("target", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_ends_are_exact(target: torch.dtype, source: torch.dtype, device: str) -> None:
    targets, sources = lists(target, source, device)
    before = [t.clone() for t in targets]
    ema_update_(targets, sources, 1.0)
    assert all(map(torch.equal, targets, before))
    ema_update_(targets, sources, 0)
    assert all(torch.equal(t, s.to(t.dtype)) for t, s in zip(targets, sources, strict=True))


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_stays_between_target_and_source(momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, source = (torch.randn(33, generator=generator) for _ in range(2))
    low, high = torch.minimum(target, source), torch.maximum(target, source)
    slack = 2 * torch.finfo(torch.float32).eps * (target.abs() + source.abs())
    ema_update_([target], [source], momentum)
    assert (target >= low - slack).all() and (target <= high + slack).all()


@pytest.mark.parametrize(("target", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_op_is_the_reference(target: torch.dtype, source: torch.dtype) -> None:
    targets, sources = lists(target, source)
    expected = [t.clone() for t in targets]
    reference.ema_update_(expected, sources, 0.99)
    ema_update_(targets, sources, 0.99)
    torch.testing.assert_close(targets, expected, rtol=2 * torch.finfo(target).eps, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_values_propagate(value: float) -> None:
    target = torch.tensor([0.0, value])
    ema_update_([target], [torch.tensor([value, 0.0])], 0.5)
    assert not target.isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_and_strided_sources(device: str) -> None:
    target = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    source = torch.randn(2, 3, 4, 5, device=device)
    transposed = torch.randn(5, 4, 3, 2, device=device).permute(3, 2, 1, 0)
    expanded = torch.randn(1, 1, 1, 5, device=device).expand(2, 3, 4, 5)
    for strided in (source, transposed, expanded):
        check([target], [strided], 0.5, 0.5)
    assert target.is_contiguous(memory_format=torch.channels_last)


def test_ambiguous_strides() -> None:
    """A single channel is contiguous in both formats, with strides that differ."""
    target = torch.randn(5, 1, 3, 3).contiguous(memory_format=torch.channels_last)
    check([target], [torch.randn(5, 1, 3, 3)], 0.5, 0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("device", DEVICES)
def test_integers_and_bools_are_copied(device: str, momentum: float) -> None:
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    sources = [torch.randint(-100, 100, (5, 1000), device=device).to(dtype) for dtype in kinds]
    targets = [torch.zeros_like(x) for x in sources]
    averaged = [torch.zeros(9, device=device), torch.zeros(9, device=device)]
    ema_update_([averaged[0], *targets], [averaged[1] + 1, *(x.t().contiguous().t() for x in sources)], momentum)
    assert all(map(torch.equal, targets, sources))
    assert torch.equal(averaged[0], torch.full_like(averaged[0], 1 - momentum))


def test_takes_modules_parameters() -> None:
    teacher, student = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    expected = [0.9 * t.detach() + 0.1 * s.detach() for t, s in pairs]
    ema_update_(teacher.parameters(), student.parameters(), 0.9)
    torch.testing.assert_close([t.detach() for t in teacher.parameters()], expected)
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in teacher.parameters())


def test_shared_parameter_and_empty_lists_are_legal() -> None:
    shared = torch.randn(3)
    before = shared.clone()
    ema_update_([shared], [shared], 0.5)
    assert torch.equal(shared, before)
    ema_update_([], [], 0.5)


def test_autograd_notices_the_write() -> None:
    target, x = torch.ones(3), torch.ones(3, requires_grad=True)
    y = (x * target).sum()
    ema_update_([target], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        target = torch.zeros(3)
        ema_update_([target], [torch.ones(3)], 0.5)
        assert torch.equal(target, torch.full((3,), 0.5))


class TestRefused:
    """Each argument by its name, with what came, before anything is written."""

    @staticmethod
    def refused(
        error: type[Exception], match: str, targets: list, sources: list, momentum: Tensor | float = 0.5
    ) -> None:
        before = [t.clone() for t in targets if isinstance(t, Tensor)]
        with pytest.raises(error, match=match):
            ema_update_(targets, sources, momentum)
        assert all(map(torch.equal, [t for t in targets if isinstance(t, Tensor)], before))

    def test_lengths(self) -> None:
        self.refused(ValueError, "same length, got 1 and 2", [torch.zeros(1)], [torch.ones(1), torch.ones(1)])

    def test_shapes(self) -> None:
        targets, sources = [torch.zeros(1), torch.zeros(2, 3)], [torch.ones(1), torch.ones(3, 2)]
        self.refused(ValueError, r"sources\[1\] .* targets\[1\], \(2, 3\), got \(3, 2\)", targets, sources)

    @pytest.mark.parametrize("other", [torch.int32, torch.float32, torch.bool])
    def test_copies_from_another_dtype(self, other: torch.dtype) -> None:
        targets = [torch.zeros(2), torch.zeros(3, dtype=torch.int64)]
        match = rf"targets\[1\] and sources\[1\] must have one dtype, got torch.int64 and {other}"
        self.refused(TypeError, match, targets, [torch.ones(2), torch.ones(3, dtype=other)])

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        self.refused(TypeError, rf"targets\[0\] .*{dtype}", [torch.zeros(1, dtype=dtype)], [torch.ones(1)])
        self.refused(TypeError, rf"sources\[0\] .*{dtype}", [torch.zeros(1)], [torch.ones(1, dtype=dtype)])

    def test_not_a_tensor(self) -> None:
        self.refused(TypeError, r"sources\[0\] must be a torch.Tensor, got float", [torch.zeros(1)], [1.0])
        self.refused(TypeError, r"targets\[0\] must be a torch.Tensor, got float", [1.0], [torch.zeros(1)])

    def test_devices(self) -> None:
        meta = torch.ones(1, device="meta")
        self.refused(ValueError, r"sources\[0\] .*device.*cpu.*got meta", [torch.zeros(1)], [meta])
        self.refused(ValueError, "momentum .*cpu.*got meta", [torch.zeros(1)], [torch.ones(1)], meta)

    def test_layout(self) -> None:
        for target in (torch.zeros(4, 4).t()[1:], torch.zeros(1).expand(4), torch.zeros(8)[::2]):
            self.refused(ValueError, r"targets\[0\] must be contiguous", [target], [torch.ones(target.shape)])

    def test_overlap(self) -> None:
        memory = torch.zeros(10)
        self.refused(ValueError, r"targets\[1\] overlaps targets\[0\]", [memory[:5], memory[4:9]], [torch.ones(5)] * 2)
        self.refused(ValueError, r"targets\[1\] overlaps targets\[0\]", [memory, memory], [torch.ones(10)] * 2)
        self.refused(ValueError, r"sources\[0\] overlaps targets\[0\]", [memory[:5]], [memory[4:9]])
        targets = [memory[:3], torch.zeros(3)]
        self.refused(ValueError, r"sources\[1\] overlaps targets\[0\]", targets, [torch.ones(3), memory[:3]])

    @pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
    def test_momentum_out_of_range(self, momentum: float) -> None:
        self.refused(ValueError, "momentum must be in", [torch.zeros(1)], [torch.ones(1)], momentum)
        self.refused(ValueError, "momentum must be in", [torch.zeros(1)], [torch.ones(1)], torch.tensor(momentum))

    def test_momentum_of_another_kind(self) -> None:
        pair = [torch.zeros(1)], [torch.ones(1)]
        self.refused(TypeError, "momentum .*bool", *pair, True)
        self.refused(ValueError, r"momentum .*\(2,\)", *pair, torch.zeros(2))
        self.refused(ValueError, "momentum .*int64", *pair, torch.tensor(1))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensors_are_updated_shard_by_shard(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    target, source = (distribute_tensor(torch.full((4, 2), value), mesh, [Shard(0)]) for value in (0.0, 1.0))
    ema_update_([target], [source], 0.75)
    torch.testing.assert_close(target.full_tensor(), torch.full((4, 2), 0.25))
    replicated = distribute_tensor(torch.ones(4, 2), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"sources\[0\] must be placed as targets\[0\] .*Shard.*Replicate"):
        ema_update_([target], [replicated], 0.5)
    with pytest.raises(TypeError, match=r"targets\[0\] is a DTensor and sources\[0\] a Tensor"):
        ema_update_([target], [torch.ones(4, 2)], 0.5)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_compiles_without_graph_break(as_tensor: bool) -> None:
    def step(targets: list[Tensor], sources: list[Tensor], momentum: Tensor | float) -> Tensor:
        ema_update_(targets, sources, momentum)
        return targets[0] * 2

    targets, sources = lists(torch.float32, torch.bfloat16)
    expected = [t.clone() for t in targets]
    reference.ema_update_(expected, sources, 0.5)
    momentum = torch.tensor(0.5) if as_tensor else 0.5
    doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(targets, sources, momentum)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(doubled, 2 * expected[0])


@pytest.mark.parametrize("momentum", [(None, 0.5), (torch.tensor(0.5), math.nan)], ids=["number", "tensor"])
def test_opcheck(momentum: tuple[Tensor | None, float]) -> None:
    torch.library.opcheck(_ema_update_, (*lists(torch.float32, torch.float32), *momentum, None))
    torch.library.opcheck(_ema_update_, (*lists(torch.bfloat16, torch.float32), *momentum, torch.tensor(3)))


def test_fake_and_meta_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        ema_update_(*lists(torch.float32, torch.float32), 0.5)
    ema_update_([torch.zeros(3, device="meta")], [torch.zeros(3, device="meta")], 0.5)
