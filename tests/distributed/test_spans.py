# SPDX-License-Identifier: Apache-2.0
"""What a contrastive loss holds on a rank, and what it is where there is one process."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from span_cases import LOSSES, ROWS, group_of_one, largest_tensor, peaks, statistics

from sslkernels import losses
from sslkernels.distributed import Batch, Group


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_of_a_ring_holds_the_rows_of_all_ranks(ranks, name):
    """Forward and backward; with "gather" there is one, by which this test sees that it sees."""
    for strategy in ("ring", "bidirectional_ring"):
        assert max(ranks.run(largest_tensor, "4", name, strategy)) < 4 * ROWS
    assert min(ranks.run(largest_tensor, "4", name, "gather")) >= 4 * ROWS


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"nt_xent", "dcl", "supcon"}))
def test_a_ring_holds_no_more_among_more_ranks(ranks, name):
    """Rows, numbers and all: from three ranks on, where there is a rank to hand on to.

    The others go half of the way, the same way: on it that is so from five ranks on.
    """
    few, many = (ranks.run(peaks, world, name, "ring") for world in ("3", "4"))
    for before, after in zip(zip(*few), zip(*many)):  # forward, then backward
        assert (
            min(after) <= min(before) + 64
        )  # a number a rank; the least, as a profiler now and then takes some memory


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", LOSSES)
def test_statistics_are_of_the_own_rows_and_all_keys(ranks, name, strategy):
    for found, expected in ranks.run(statistics, "3", name, strategy):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert abs(found[key] - value) <= 1e-12 * abs(value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_counted_exactly_beside_features_of_16_bits(dtype):
    for sizes in ([128, 129], [40_000, 40_001]):
        batch = Batch("a group", 0, 2, "gather", sizes[0], torch.tensor(sizes))
        assert batch.total(torch.zeros(1, dtype=dtype)) == sum(sizes)


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_of_one_rank_is_one_process(ranks, name):
    for found, expected in ranks.run(group_of_one, "4", name):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_world_of_one_process(name):
    views = [torch.randn(ROWS, 8) for _ in range(2)]
    assert torch.equal(LOSSES[name](*views, process_group="world", strategy="ring"), LOSSES[name](*views))


MODULES = {
    "NTXentLoss": (losses.NTXentLoss(gather_distributed=True), "process_group=world"),
    "DCLWLoss": (losses.DCLWLoss(gather_distributed=True), "process_group=world"),
    "InfoNCELoss": (losses.InfoNCELoss(process_group="world", strategy="ring"), "process_group=world, strategy=ring"),
    "ClipLoss": (
        losses.ClipLoss(process_group=Group("world", strategy="ring", check="first")),
        "process_group=Group(process_group='world', strategy='ring', check='first')",
    ),
    "SupConLoss": (losses.SupConLoss(strategy="ring"), "label_smoothing=0.0"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_and_keeps_what_it_spans(name):
    module, words = MODULES[name]
    assert repr(module).endswith(f"{words})")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert other.span == module.span
    module.load_state_dict(module.state_dict())
    assert not module.state_dict()
