# SPDX-License-Identifier: Apache-2.0
"""The masks under torch.compile, torch.export, fake tensors and opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from masks_cases import CALLS, LOG_ASPECT, REFERENCES, op, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sslkernels import ops

SCALES = [0.85, 1.0], [0.15, 0.2], [0.75, 1.5]
OPS: dict[str, tuple[Any, ...]] = {
    "random_mask": (4, 2, 20, 5),
    "block_mask": (4, 8, 9, 0.3, 0.4, 4.0, 32.0, LOG_ASPECT, 1.0, 1, 0.7, True, True),
    "inverse_block_mask": (4, 8, 9, 3, 3, 12),
    "multiblock_mask": (4, 14, 13, 4, *SCALES, 10, False, False, False, None),
    "multiblock3d_mask": (4, 2, 8, 9, 3, [0.15, 0.15], [1.0, 1.0], [0.75, 1.5], False, 2, None),
    "span_mask": (4, 50, None, 0.5, 5, 0),
    "centred_span_mask": (4, 50, torch.tensor([50, 3, 0, 20]), 0.5, 0.11, 5),
    "word_span_mask": (4, 50, None, None, 0.2, [1 << 31]),
    "token_mask": (tokens(4, 20), None, None, None, 3, 1000, 0.15, 20, 0.8, 0.9, -100),
    "span_corruption": (tokens(4, 20), 5, 2, 1000, 1),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    opcheck(op(name).default, (torch.tensor(3), *OPS[name]))


def test_opcheck_of_a_fixed_context() -> None:
    args = (torch.tensor(3), 4, 14, 14, 4, *SCALES, 10, False, False, False, 12)
    opcheck(op("multiblock_mask").default, args)


@pytest.mark.parametrize("name", CALLS)
def test_one_graph(name: str) -> None:
    """fullgraph=True raises at the first graph break."""
    call = CALLS[name]
    compiled = torch.compile(lambda seed: call.tensors(seed=seed), fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(torch.tensor(5)), call.tensors(seed=5), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["random", "block beit", "multiblock", "token"])
def test_a_graph_draws_its_own_seed_or_takes_a_number(name: str) -> None:
    call = CALLS[name]
    drawn = torch.compile(lambda: call.tensors(), fullgraph=True, backend="aot_eager")
    first, second = drawn(), drawn()
    assert any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(first, second, strict=True))
    given = torch.compile(lambda: call.tensors(seed=5), fullgraph=True, backend="aot_eager")
    for x, y in zip(given(), call.tensors(seed=5), strict=True):
        assert torch.equal(x, y)


def test_any_batch() -> None:
    """One graph serves every batch size."""
    frames = torch._dynamo.testing.CompileCounter()

    def masks(x: Tensor) -> Tensor:
        visible, _ = ops.random_mask(x.shape[0], 50, 0.5, seed=3)
        return x.gather(1, visible)

    compiled = torch.compile(masks, fullgraph=True, dynamic=True, backend=frames)
    for batch in (3, 7, 12):
        x = torch.randn(batch, 50)
        assert torch.equal(compiled(x), masks(x))
    assert frames.frame_count == 1


def test_inductor() -> None:
    def step(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        visible, _ = ops.random_mask(x.shape[0], 49, 0.75, seed=seed)
        context, _ = ops.multiblock_mask(x.shape[0], (14, 14), seed=seed)
        return x.gather(1, visible), context

    x, seed = torch.randn(6, 49), torch.tensor(4)
    for got, expected in zip(torch.compile(step, fullgraph=True)(x, seed), step(x, seed), strict=True):
        assert torch.equal(got, expected)


def test_export() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: Tensor, seed: Tensor) -> Tensor:
            return x.gather(1, ops.random_mask(x.shape[0], x.shape[1], 0.5, seed=seed)[0])

    x, seed = torch.randn(4, 50), torch.tensor(4)
    exported = torch.export.export(Masked(), (x, seed), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    x = torch.randn(9, 50)
    assert torch.equal(exported.module()(x, seed), Masked()(x, seed))


@pytest.mark.parametrize("name", ["random", "block beit", "span spanbert", "token", "corruption"])
def test_shapes_of_fake_tensors(name: str) -> None:
    call, mode = CALLS[name], FakeTensorMode()
    with mode:
        fake = call.tensors(**{k: mode.from_tensor(x) for k, x in call.kwargs.items() if isinstance(x, Tensor)})
    for x, y in zip(fake, call.tensors(), strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("multiblock")])
def test_the_reference_never_waits_for_the_device(name: str) -> None:
    """Tensors without values refuse to be looked at."""
    args = [x.to("meta") if isinstance(x, Tensor) else x for x in OPS[name]]
    got = REFERENCES[name](torch.empty((), dtype=torch.int64, device="meta"), *args)
    expected = op(name)(torch.tensor(3), *OPS[name])
    for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (got, expected)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_the_same_mask_on_every_device(name: str) -> None:
    call = CALLS[name]
    moved = {key: x.cuda() for key, x in call.kwargs.items() if isinstance(x, Tensor)}
    changed = moved or {"device": "cuda"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call.tensors(seed=5, **changed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(got, call.tensors(seed=5), strict=True):
        assert x.is_cuda
        assert torch.equal(x.cpu(), y)
