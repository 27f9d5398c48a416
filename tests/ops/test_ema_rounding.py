# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding in ema_update_: the bits of the reference, the odds of the definition, no stalling."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels.ops.ema import ema_update_
from sslkernels.reference import ema as reference

ROUNDED = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *ROUNDED)
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6e-8, -6e-5, 65504.0, 65520.0, -3.39e38]


def name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN, whatever its payload; zeros differ by their sign."""
    nan = a.isnan() & b.isnan()
    return torch.equal(a.signbit() | nan, b.signbit() | nan) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-8, 1e5], ids=["normal", "small", "denormal", "large"])
@pytest.mark.parametrize(("target", "source"), list(product(DTYPES, DTYPES)), ids=name)
def test_kernel_has_the_bits_of_the_reference(
    target: torch.dtype, source: torch.dtype, scale: float, level: int
) -> None:
    sizes = (0, 1, 3, 511, 513, 4097)  # 512 words are made at a time, 4096 elements are a chunk
    targets = [(torch.randn(n) * scale).to(target) for n in sizes] + [torch.tensor(SPECIAL).to(target)]
    sources = [(torch.randn(x.shape) * scale).to(source) for x in targets]
    for momentum, seed in ((0.999, 7), (0.3, 2**63 - 1), (0.999, None)):
        results = [[x.clone() for x in targets] for _ in range(2)]
        ema_update_(results[0], sources, momentum, stochastic_rounding=seed is not None, seed=seed)
        reference.ema_update_(results[1], sources, momentum, None if seed is None else torch.tensor(seed))
        assert all(map(same_bits, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_threads_and_repeats_have_the_same_bits(dtype: torch.dtype) -> None:
    targets, before = [torch.randn(n).to(dtype) for n in (5000, 240_001, 3)], torch.get_num_threads()
    targets += [torch.zeros(300_000, dtype=torch.uint8)]
    sources = [torch.randn(n) for n in (5000, 240_001, 3)] + [torch.arange(300_000).to(torch.uint8)]
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append([x.clone() for x in targets])
        ema_update_(results[-1], sources, 0.9, stochastic_rounding=True, seed=1)
    torch.set_num_threads(before)
    assert torch.equal(results[0][-1], sources[-1])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])
    reference.ema_update_(targets[:1], sources[:1], 0.9, torch.tensor(1))
    assert torch.equal(results[0][0], targets[0])


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=5),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from(ROUNDED),
)
@settings(deadline=None)
def test_any_shapes(shapes: list[tuple[int, ...]], momentum: float, seed: int, dtype: torch.dtype) -> None:
    targets = [torch.randn(shape).to(dtype) for shape in shapes]
    sources = [torch.randn(shape) for shape in shapes]
    expected = [x.clone() for x in targets]
    reference.ema_update_(expected, sources, momentum, torch.tensor(seed))
    ema_update_(targets, sources, momentum, stochastic_rounding=True, seed=seed)
    assert all(map(torch.equal, targets, expected))


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The two numbers of dtype around x > 0, found by their bit patterns."""
    every = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16).view(dtype).double()
    return float(every[every <= x].max()), float(every[every > x].min())


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize("value", [1.0017, 0.3333, 1e-5, 3e-8, 2e-10, 6.1e-5, 1000.1], ids=str)
@pytest.mark.parametrize("dtype", ROUNDED, ids=name)
def test_each_neighbour_is_as_likely_as_the_value_is_near_to_the_other(
    dtype: torch.dtype, value: float, sign: float
) -> None:
    """The count of one of them is binomial: five standard deviations (and one, where it is rare)."""
    n = 200_000
    exact = sign * float(torch.tensor(value))  # what float32 makes of it
    target = torch.zeros(n, dtype=dtype)
    ema_update_([target], [torch.full((n,), exact)], 0.0, stochastic_rounding=True, seed=1)
    low, high = neighbours(abs(exact), dtype)
    away = (target.double().abs() == high).sum().item()
    assert away + (target.double().abs() == low).sum().item() == n
    assert target[target != 0].signbit().eq(sign < 0).all()
    odds = (abs(exact) - low) / (high - low)
    assert abs(away - n * odds) <= 5 * (n * odds * (1 - odds)) ** 0.5 + 1


@pytest.mark.parametrize("dtype", ROUNDED, ids=name)
def test_what_the_dtype_has_stays_itself(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite, others = every[every.isfinite()], every[~every.isfinite()]
    target = torch.zeros_like(finite)
    ema_update_([target], [finite], 0.0, stochastic_rounding=True, seed=5)
    assert torch.equal(target, finite)
    target = torch.zeros_like(others)
    ema_update_([target], [others], 0.75, stochastic_rounding=True, seed=5)
    assert same_bits(target, others)


@pytest.mark.parametrize("dtype", ROUNDED, ids=name)
def test_sixteen_bits_do_not_stall(dtype: torch.dtype) -> None:
    """0 on its way to 1 is at 1 - 0.999^3000 = 0.950 after 3,000 steps; to nearest, it stops where steps vanish."""
    rounded, nearest = torch.zeros(2, 4096, dtype=dtype)
    source = torch.ones_like(rounded)
    for step in range(3000):
        ema_update_([rounded], [source], 0.999, stochastic_rounding=True, seed=step)
        ema_update_([nearest], [source], 0.999)
    assert abs(rounded.double().mean().item() - 0.950) < 0.005
    if dtype == torch.bfloat16:
        assert nearest.max() <= 0.5


def test_float16_denormals_do_not_stall() -> None:
    target, source = torch.zeros(100_000, dtype=torch.float16), torch.full((100_000,), 2.0**-24)
    for step in range(1000):
        ema_update_([target], [source], 0.999, stochastic_rounding=True, seed=step)
    assert abs(target.double().mean().item() * 2**24 - (1 - 0.999**1000)) < 0.01


def updated(targets: list[Tensor], **options: Any) -> list[Tensor]:
    targets = [x.clone() for x in targets]
    ema_update_(targets, [torch.ones_like(x) for x in targets], 0.5, stochastic_rounding=True, **options)
    return targets


def test_the_seed_decides_and_each_tensor_has_its_own_words() -> None:
    targets = [torch.rand(1000).bfloat16()] * 2
    first, again, other = updated(targets, seed=3), updated(targets, seed=3), updated(targets, seed=4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(updated(targets, seed=torch.tensor(3))[0], first[0])
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    drawn = [updated(targets, generator=generator)[0] for generator in (generators[0], *generators)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(1)
    defaults = updated(targets)
    torch.manual_seed(1)
    assert torch.equal(updated(targets)[0], defaults[0])


def test_elements_are_numbered_in_the_order_of_memory() -> None:
    flat = torch.rand(2 * 3 * 4 * 5).bfloat16()
    image = flat.view(2, 4, 5, 3).permute(0, 3, 1, 2)  # channels_last
    expected = flat.clone()
    reference.ema_update_([expected], [torch.zeros(120)], 0.7, torch.tensor(2))
    target = image.clone()
    assert target.is_contiguous(memory_format=torch.channels_last)
    ema_update_([target], [torch.zeros(2, 3, 4, 5)], 0.7, stochastic_rounding=True, seed=2)
    assert torch.equal(target.permute(0, 2, 3, 1).reshape(-1), expected)
    by_reference = image.clone()
    reference.ema_update_([by_reference], [torch.zeros(2, 3, 4, 5)], 0.7, torch.tensor(2))
    assert torch.equal(by_reference, target)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_a_seed(backend: str) -> None:
    torch.compiler.reset()

    def step(target: Tensor, source: Tensor, seed: Tensor) -> None:
        ema_update_([target], [source], 0.99, stochastic_rounding=True, seed=seed)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    target, expected = torch.zeros(2, 500, dtype=torch.bfloat16)
    for number in range(3):
        compiled(target, torch.ones(500), torch.tensor(number))
        step(expected, torch.ones(500), torch.tensor(number))
    assert torch.equal(target, expected)


def test_bad_options() -> None:
    target, source = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)
    with pytest.raises(ValueError, match="generator and seed are of stochastic_rounding=True"):
        ema_update_([target], [source], 0.5, seed=1)
    with pytest.raises(ValueError, match="one of seed and generator, got both"):
        ema_update_([target], [source], 0.5, stochastic_rounding=True, seed=1, generator=torch.Generator())
    with pytest.raises(TypeError, match="seed must be an integer or a tensor, got float"):
        ema_update_([target], [source], 0.5, stochastic_rounding=True, seed=1.5)
    assert not target.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("target", "source"), list(product(ROUNDED, DTYPES)), ids=name)
def test_the_device_has_the_bits_of_the_reference(target: torch.dtype, source: torch.dtype) -> None:
    targets = [torch.randn(n).to(target) for n in (0, 1, 4095, 4096, 9000)] + [torch.tensor(SPECIAL).to(target)]
    sources = [torch.randn(x.shape).to(source) for x in targets]
    on_device = [x.cuda() for x in targets]
    seed = torch.tensor(11)
    ema_update_(on_device, [x.cuda() for x in sources], 0.99, stochastic_rounding=True, seed=seed.cuda())
    reference.ema_update_(targets, sources, 0.99, seed)
    assert all(same_bits(a.cpu(), b) for a, b in zip(on_device, targets))
