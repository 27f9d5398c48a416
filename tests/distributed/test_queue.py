# SPDX-License-Identifier: Apache-2.0
"""Memory queues over several ranks: the same on all, or a shard on each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import queue_cases as cases
import torch
from contract import STRATEGIES
from ranks import GROUPS, RankError

from sslkernels.losses import MemoryQueue

STEPS = [(2, 2, 2, 2), (3, 1, 2, 5), (0, 4, 1, 0), (7, 1, 9, 3), (0, 0, 0, 0), (1, 0, 0, 2)]


@pytest.mark.parametrize(
    ("group", "dtype", "compiled"),
    [("2", torch.float32, True), ("4", torch.bfloat16, False), ("subgroup", torch.float64, False)],
)
def test_all_ranks_hold_what_one_process_would(ranks, group, dtype, compiled):
    steps = [sizes[: len(GROUPS[group])] for sizes in STEPS]
    found = ranks.run(cases.enqueued, group, 10, dtype, steps, compiled)
    alone = MemoryQueue(10, cases.DIM, dtype)
    alone.keys.copy_(found[0][0][0])
    states = [cases.queue_state(alone)]
    for step, sizes in enumerate(steps):
        alone(torch.cat(cases.keys_of(sizes, step, torch.float64)))
        states.append(cases.queue_state(alone))
    for of_rank in found:
        for (keys, pointer), (expected, place) in zip(of_rank, states, strict=True):
            assert torch.equal(keys, expected)
            assert pointer == place


@pytest.mark.parametrize("compiled", [False, True])
def test_a_shard_takes_the_own_keys_without_an_exchange(ranks, compiled):
    steps = [sizes[:3] for sizes in STEPS]
    found = ranks.run(cases.shards, "3", 12, steps, compiled)
    for rank, states in enumerate(found):
        alone = MemoryQueue(4, cases.DIM)
        alone.keys.copy_(states[0][0])
        for step, sizes in enumerate(steps):
            alone(cases.keys_of(sizes, step)[rank])
            assert torch.equal(states[step + 1][0], alone.keys)
            assert states[step + 1][1] == int(alone.pointer)
    assert not torch.equal(found[0][0][0], found[1][0][0])  # first rows of their own


def test_a_shard_outlives_training_saving_and_loading(ranks):
    # as a buffer it would be rank 0's after DistributedDataParallel's first forward
    for found in ranks.run(cases.shard_in_a_module, "2"):
        assert found == {
            "kept": True,
            "saved": ["layer.bias", "layer.weight", "queue.keys", "queue.pointer"],
            "loaded": [True, True],
            "buffers": 0,
            "copied": True,
            "moved": [torch.float16, torch.int64],
            "repr": "MemoryQueue(size=8, dim=4, dtype=torch.float32, process_group=world, sharded=True)",
        }


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "smoothed": {"label_smoothing": 0.1},
    "hard, debiased": {"beta": 0.5, "tau_plus": 0.1},
    "with the batch": {"in_batch": True},
    "with the batch, smoothed": {"in_batch": True, "label_smoothing": 0.1},
}


def compare(ranks, group, sharded, inside, strategy, options, size, sizes, compiled=False):
    call = (inside, strategy, options, size, sizes)
    exact = cases.training(None, False, call)
    found = ranks.run(cases.training, group, sharded, call, compiled)
    for step, (loss, gradients) in enumerate(exact):
        value = torch.stack([of_rank[step][0] for of_rank in found]).mean()
        assert abs(value - loss) <= 1e-10 * abs(loss), f"step {step}"
        for of_rank in found:
            for name, gradient in gradients.items():
                error = (of_rank[step][1][name] - gradient).norm() / gradient.norm()
                assert error <= 1e-10, f"step {step}: {name} is wrong by {error:.1e}"


@pytest.mark.parametrize("group", ["2", "3", "4"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_shards_are_as_good_as_the_whole(ranks, name, strategy, group):
    world = len(GROUPS[group])
    compare(ranks, group, True, False, strategy, OPTIONS[name], 6 * world, (2,) * world)


@pytest.mark.parametrize("options", [{}, {"in_batch": True}], ids=["queue", "with the batch"])
def test_a_replicated_queue_takes_uneven_batches(ranks, options):
    compare(ranks, "3", False, False, "ring", options, 12, (3, 1, 2))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("group", ["3", "subgroup"])
def test_a_memory_bank_inside_the_loss(ranks, group, sharded):
    world = len(GROUPS[group])
    compare(ranks, group, sharded, True, "gather", {}, 6 * world, (2,) * world)


@pytest.mark.parametrize(("sharded", "inside"), [(True, False), (True, True), (False, True)])
def test_steps_with_a_queue_compiled(ranks, sharded, inside):
    compare(ranks, "2", sharded, inside, "ring", {}, 12, (2, 2), compiled=True)


def test_a_shard_is_without_gradient(ranks):
    with pytest.raises(RankError, match=r"sharded_negatives needs negative_keys \(M, D\) without gradient, got"):
        ranks.run(cases.shard_with_a_gradient, "2")


def test_shards_for_another_number_of_ranks():
    """As docs/losses.md does it: four shards become two, and the oldest keys still give way first."""
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    (block,) = (x for x in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "states" in x)
    old = [MemoryQueue(3, 1) for _ in range(4)]
    for n in range(20):
        old[n % 4](torch.tensor([[float(n)]]))
    new = [MemoryQueue(6, 1) for _ in range(2)]
    for rank, queue in enumerate(new):
        exec(block, {"torch": torch, "states": [q.state_dict() for q in old], "queue": queue, "rank": rank, "world": 2})
        queue(torch.full((2, 1), -1.0))
    kept = torch.cat([queue.keys for queue in new]).flatten().tolist()
    assert sorted(kept) == [-1.0] * 4 + [float(n) for n in range(12, 20)]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_queue_of_one_process_in_the_default_group(sharded):
    queue = MemoryQueue(6, 3, process_group="world", sharded=sharded)
    queue(torch.ones(2, 3))
    assert queue.keys.shape == (6, 3)
    assert int(queue.pointer) == 2


def test_sizes_that_cannot_be_shared(ranks):
    with pytest.raises(RankError, match="size must be a multiple of the 3 ranks that share the queue, got 10"):
        ranks.run(cases.shards, "3", 10, [], False)


def test_a_shard_knows_its_group(ranks):
    with pytest.raises(RankError, match="queue of 2 shards is used by 1 ranks: it must be made in their group"):
        ranks.run(cases.shard_elsewhere, "2")
