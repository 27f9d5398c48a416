# SPDX-License-Identifier: Apache-2.0
"""The memory queue against a Python list, and losses whose queue changes between forward and backward."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import loss_formulas as formula
import pytest
import torch
from torch import Tensor

from sslkernels.losses import InfoNCELoss, MemoryQueue, NTXentLoss

SIZE, D, N = 10, 3, 4


def rows(n: int, start: int = 0) -> Tensor:
    """Keys that name themselves: 0, 0, 0; 1, 1, 1; ..."""
    return torch.arange(start, start + n).float()[:, None].expand(n, D)


@pytest.mark.parametrize(
    "batches",
    [[4], [10], [4, 4, 4], [3, 7, 1], [10, 10], [11], [4, 25], [1] * 23, [0], [9, 0, 3], [30]],
    ids=str,
)
def test_it_holds_the_last_keys_in_a_ring(batches: list[int]) -> None:
    queue = MemoryQueue(SIZE, D)
    slots = [row.tolist() for row in queue.keys]
    pointer = seen = 0
    for n in batches:
        queue(rows(n, seen))
        for key in rows(n, seen).tolist():
            slots[pointer] = key
            pointer = (pointer + 1) % SIZE
        seen += n
        assert queue.keys.tolist() == slots
        assert int(queue.pointer) == pointer
    if seen >= SIZE:
        last = deque(range(seen), maxlen=SIZE)
        assert sorted(queue.keys[:, 0].tolist()) == sorted(last)


def test_it_starts_with_random_unit_rows() -> None:
    first, again, other = (MemoryQueue(100, 8, generator=torch.Generator().manual_seed(s)).keys for s in (1, 1, 2))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(100))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.mean(0).abs().max() < 0.3  # of no preferred direction


def test_it_changes_in_place() -> None:
    queue = MemoryQueue(SIZE, D)
    keys, pointer = queue.keys, queue.pointer
    queue(rows(N))
    assert queue.keys is keys
    assert queue.pointer is pointer
    assert torch.equal(keys[:N], rows(N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_storage_in_another_dtype(dtype: torch.dtype) -> None:
    queue, keys = MemoryQueue(SIZE, D, dtype), torch.randn(N, D)
    queue(keys)
    assert queue.keys.dtype == dtype
    assert torch.equal(queue.keys[:N], keys.to(dtype))
    query = torch.randn(N, D, requires_grad=True)
    loss = InfoNCELoss(normalize=False)(query, keys, queue.keys)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = formula.info_nce(query.double(), keys.double(), queue.keys.double(), normalize=False)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_keys_with_a_gradient_are_stored_without_it() -> None:
    queue = MemoryQueue(SIZE, D)
    queue(torch.randn(N, D, requires_grad=True) * 2)
    assert not queue.keys.requires_grad


def test_state_dict_round_trip_and_repr() -> None:
    queue, other = MemoryQueue(SIZE, D), MemoryQueue(SIZE, D)
    queue(rows(N))
    other.load_state_dict(queue.state_dict())
    assert sorted(queue.state_dict()) == ["keys", "pointer"]
    for q in (queue, other):
        q(rows(N, 50))
    assert torch.equal(queue.keys, other.keys)
    assert int(other.pointer) == 2 * N
    assert repr(queue) == "MemoryQueue(size=10, dim=3, dtype=torch.float32)"
    assert next(iter(copy.deepcopy(queue).half().buffers())).dtype == torch.float16
    assert copy.deepcopy(queue).half().pointer.dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MemoryQueue(0, 3), ValueError, "size must be positive, got 0"),
        (lambda: MemoryQueue(3, -1), ValueError, "dim must be positive, got -1"),
        (lambda: MemoryQueue(3.0, 1), TypeError, "size must be an integer, got float"),
        (lambda: MemoryQueue(3, 1, torch.int64), TypeError, "dtype must be floating, got torch.int64"),
        (
            lambda: MemoryQueue(3, 2)(torch.ones(1, 4)),
            ValueError,
            r"as many features as queue \(2\), got shape \(1, 4\)",
        ),
        (lambda: MemoryQueue(3, 2)(torch.ones(2)), ValueError, r"keys must be 2-D .*\(2,\)"),
        (lambda: MemoryQueue(3, 2)(torch.ones(1, 2).long()), TypeError, "keys must have a floating dtype"),
        (lambda: MemoryQueue(3, 2)(torch.ones(1, 2, device="meta")), ValueError, "on the device of queue .*got meta"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "hard": {"beta": 1.0},
    "debiased": {"tau_plus": 0.1},
    "hard debiased, steep": {"beta": 2.0, "tau_plus": 0.1},
    "with the batch": {"in_batch": True},
    "normalised again": {"normalize": True},
}


def gradient(loss: Tensor, query: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), query)[0]


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [
        pytest.param(torch.float32, False, id="eager"),
        pytest.param(torch.bfloat16, False, id="eager, 16-bit queue"),
        pytest.param(torch.float32, True, id="compiled"),
    ],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_enqueueing_between_forward_and_backward(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """As MoCo does. The gradient is that of the queue as the forward saw it, bit for bit."""
    loss_fn = InfoNCELoss(torch.nn.Parameter(torch.tensor(0.2)), **{"normalize": False, **OPTIONS[name]})
    queue = MemoryQueue(SIZE, D, dtype)
    queue(torch.nn.functional.normalize(torch.randn(SIZE, D), dim=1))
    frozen = queue.keys.clone()
    query, key = torch.randn(N, D, requires_grad=True), torch.nn.functional.normalize(torch.randn(N, D), dim=1)
    expected = gradient(loss_fn(query, key, frozen), query)

    def step(query: Tensor, key: Tensor) -> Tensor:
        loss = loss_fn(query, key, queue.keys)
        queue(key)
        return loss

    if compiled:
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss = step(query, key)
    assert torch.equal(queue.keys[:N], key.to(dtype))
    queue.keys.fill_(torch.nan)
    assert torch.equal(gradient(loss, query), expected)


def test_the_loss_keeps_no_part_of_the_queue_for_backward() -> None:
    queue, saved = MemoryQueue(5000, D), []
    query, key = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    for options in OPTIONS.values():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            InfoNCELoss(**{"normalize": False, **options})(query, key, queue.keys)
    assert saved
    assert max(saved) <= 5000  # a row of numbers about keys, not keys


def test_a_memory_bank_inside_the_loss_may_change_before_backward() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(SIZE, D))
    bank = loss_fn.memory_bank.keys.clone()
    query, key = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
    gradient(loss_fn(query, key), query)
    restored = NTXentLoss(memory_bank_size=(SIZE, D))
    restored.memory_bank.keys.copy_(bank)
    again = restored(query, key)
    restored.memory_bank.keys.fill_(torch.nan)
    loss_fn.memory_bank.keys.copy_(bank)
    assert torch.equal(gradient(again, query), gradient(loss_fn(query, key), query))


def test_the_queue_compiles_for_any_batch() -> None:
    torch.compiler.reset()
    queue, eager = MemoryQueue(SIZE, D), MemoryQueue(SIZE, D)
    eager.load_state_dict(queue.state_dict())
    compiled = torch.compile(queue, backend="aot_eager", fullgraph=True)
    for n in (4, 4, 7, 30, 1):
        keys = torch.randn(n, D)
        compiled(keys)
        eager(keys)
        assert torch.equal(queue.keys, eager.keys)
        assert torch.equal(queue.pointer, eager.pointer)
