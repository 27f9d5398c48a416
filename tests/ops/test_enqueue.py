# SPDX-License-Identifier: Apache-2.0
"""enqueue_ against a Python loop: any batch size, dtype and stride; a pointer out of range writes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels.ops.ema import _enqueue_, enqueue_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def written_out(queue: Tensor, pointer: int, keys: Tensor) -> tuple[Tensor, int]:
    queue = queue.clone()
    for key in keys:
        queue[pointer] = key.to(queue.dtype)
        pointer = (pointer + 1) % queue.shape[0]
    return queue, pointer


@given(
    size=st.integers(1, 9),
    count=st.integers(0, 25),
    start=st.integers(0, 8),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    given=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,)]),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_is_a_loop_over_the_keys(
    size: int, count: int, start: int, dim: int, dtype: torch.dtype, given: torch.dtype, shape: Any, strided: bool
) -> None:
    start %= size
    queue = torch.randn(dim, size).to(dtype).t() if strided else torch.randn(size, dim).to(dtype)
    keys = torch.randn(count, 2 * dim + 1).to(given)[:, 1::2][:, :dim] if strided else torch.randn(count, dim).to(given)
    pointer = torch.full(shape, start)
    expected, end = written_out(queue, start, keys)
    enqueue_(queue, pointer, keys)
    assert torch.equal(queue, expected)
    assert int(pointer) == end


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 3, 10, 25])
def test_on_the_device(count: int) -> None:
    queue, keys = torch.randn(10, 3), torch.randn(count, 3)
    expected, end = written_out(queue, 8, keys)
    on_device, pointer = queue.cuda(), torch.tensor(8, device="cuda")
    enqueue_(on_device, pointer, keys.cuda())
    assert torch.equal(on_device.cpu(), expected) and int(pointer) == end
    pointer.fill_(-1)
    enqueue_(on_device, pointer, keys.cuda() + 1)
    assert torch.equal(on_device.cpu(), expected) and int(pointer) == -1


def test_keys_take_no_gradient_and_autograd_notices_the_write() -> None:
    queue, pointer = torch.zeros(4, 2), torch.tensor(0)
    x = torch.ones(2, requires_grad=True)
    y = (queue * x).sum()
    enqueue_(queue, pointer, torch.ones(1, 2, requires_grad=True) * 2)
    assert not queue.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    ("queue", "pointer", "keys", "error", "match"),
    [
        (torch.zeros(4, 2), torch.tensor(4), torch.ones(1, 2), ValueError, r"pointer must be in \[0, 4\), got 4"),
        (torch.zeros(4, 2), torch.tensor(-1), torch.ones(1, 2), ValueError, r"pointer must be in \[0, 4\), got -1"),
        (torch.zeros(4, 2), torch.tensor(0), torch.ones(1, 3), ValueError, r"keys must have as many .*\(1, 3\)"),
        (torch.zeros(4, 2), torch.tensor(0), torch.ones(2), ValueError, r"keys must be 2-D .*\(2,\)"),
        (torch.zeros(4, 2), torch.tensor(0), torch.ones(1, 2).long(), TypeError, "keys must have a floating dtype"),
        (torch.zeros(4, 2).long(), torch.tensor(0), torch.ones(1, 2), TypeError, "queue must have a floating dtype"),
        (torch.zeros(0, 2), torch.tensor(0), torch.ones(1, 2), ValueError, "queue must have room"),
        (torch.zeros(4, 2), torch.tensor(0.0), torch.ones(1, 2), ValueError, "pointer must be one int64 .*float32"),
        (torch.zeros(4, 2), torch.zeros(2).long(), torch.ones(1, 2), ValueError, r"pointer must be one .*\(2,\)"),
        (torch.zeros(4, 2), 0, torch.ones(1, 2), TypeError, "pointer must be a torch.Tensor, got int"),
        (torch.zeros(4, 2), torch.tensor(0), torch.ones(1, 2, device="meta"), ValueError, "keys .*got meta"),
        (torch.zeros(4, 2), torch.zeros((), device="meta").long(), torch.ones(1, 2), ValueError, "pointer .*got meta"),
    ],
)
def test_refused(queue: Tensor, pointer: Any, keys: Tensor, error: type[Exception], match: str) -> None:
    before = pointer.clone() if isinstance(pointer, Tensor) else pointer
    with pytest.raises(error, match=match):
        enqueue_(queue, pointer, keys)
    assert not queue.any()
    assert not isinstance(pointer, Tensor) or pointer.is_meta or torch.equal(pointer, before)


def test_keys_from_the_queue_itself_are_refused() -> None:
    queue = torch.arange(8.0).view(4, 2)
    with pytest.raises(ValueError, match="keys must not lie in the memory of queue"):
        enqueue_(queue, torch.tensor(1), queue[:2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    torch.compiler.reset()

    def step(queue: Tensor, pointer: Tensor, keys: Tensor) -> Tensor:
        enqueue_(queue, pointer, keys)
        return queue.sum()

    queue, pointer = torch.zeros(6, 2), torch.tensor(5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (2, 3, 20):
        expected, end = written_out(queue, int(pointer), keys := torch.randn(count, 2))
        total = compiled(queue, pointer, keys)
        assert torch.equal(queue, expected) and int(pointer) == end
        torch.testing.assert_close(total, expected.sum())


def test_opcheck_and_fakes() -> None:
    torch.library.opcheck(_enqueue_, (torch.zeros(4, 2), torch.tensor(3), torch.ones(2, 2)))
    with torch._subclasses.FakeTensorMode():
        enqueue_(torch.zeros(4, 2), torch.tensor(3), torch.ones(2, 2))
    meta = [torch.zeros(shape, device="meta") for shape in ((4, 2), (2, 2))]
    enqueue_(meta[0], torch.zeros((), dtype=torch.int64, device="meta"), meta[1])
