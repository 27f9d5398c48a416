# SPDX-License-Identifier: Apache-2.0
"""What losses over several processes cost: bytes counted and by formula, memory a rank, the model's arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import scaling_cases
from ranks import GROUPS, Ranks

from benchmarks.scaling import jobs, model, predict, report, traffic
from benchmarks.scaling.cases import LOSSES
from benchmarks.scaling.counting import EXCHANGE
from benchmarks.scaling.model import Cluster, Half, Link, Measured
from benchmarks.scaling.traffic import Trip
from sslkernels.distributed import STRATEGIES

EVEN, UNEVEN = (5, 5, 5, 5), (3, 6, 2, 5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.mark.parametrize("group", ["2", "3", "4"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss, D", [(loss, 4) for loss in LOSSES] + [("barlow_twins_loss", 48)])
def test_bytes_that_ranks_send_are_those_of_the_formula(ranks, loss, D, strategy, group):
    """Barlow Twins in the space of its columns, and in that of its rows."""
    world = len(GROUPS[group])
    for sizes, agreement in ((EVEN, "first"), (EVEN, "step"), (UNEVEN, "step")):
        counts = sizes[:world]
        found = ranks.run(jobs.count, group, loss, counts, D, strategy, agreement)
        for rank, halves in enumerate(found):
            expected = traffic.sent(loss, counts, rank, strategy, D, kept=True)
            assert [sent for sent, _ in halves] == pytest.approx(expected, rel=1e-12), (
                f"rank {rank} of {counts}, check={agreement!r}"
            )


def test_comparing_what_ranks_bring_in_each_step_costs_one_exchange(ranks):
    for group, world in (("2", 2), ("4", 4)):
        for _ in range(2):
            found = ranks.run(jobs.count, group, "nt_xent", EVEN[:world], 4, "ring", "step")
            assert [compared for _, compared in found[0]] == [(world - 1) * EXCHANGE, 0]


@pytest.mark.parametrize("loss", LOSSES)
def test_who_is_timed_keeps_the_contract(ranks, loss):
    for found in ranks.run(scaling_cases.check, "4", loss, 6, 8)[:1]:
        assert set(STRATEGIES) <= set(found)
        assert all(result["ok"] for result in found.values()), found


def test_a_wrong_gradient_is_not_timed(ranks):
    """What ClipLoss gives without the gradient of gathered rows."""
    found = ranks.run(scaling_cases.without_gradient, "4", 6, 8)[0]
    assert found["value_error"] < 1e-6 and not found["ok"]


def test_memory_of_a_ring_does_not_grow_with_the_world(ranks):
    n, width = 512, 1024
    block = n * width * 4  # bytes of the features of a rank

    def peak(strategy: str, group: str) -> float:
        return ranks.run(scaling_cases.peak, group, "clip_loss", n, width, strategy)[0] / block

    assert peak("ring", "4") == pytest.approx(peak("ring", "3"), abs=0.1)
    assert peak("gather", "4") - peak("gather", "3") > 1.9  # the keys, and what is found for them


# formulas and model


def test_a_ring_of_a_symmetric_loss_sends_half_of_what_a_gather_does():
    whole, half = (Trip(cargo=8, found=4, half=half, summed=True) for half in (False, True))
    counts = [10] * 5
    assert whole.sent(counts, 0, "ring") == whole.sent(counts, 0, "gather") == 4 * 10 * 12
    assert half.sent(counts, 0, "ring") == 2 * 10 * 12
    assert half.sent(counts, 0, "bidirectional_ring") == half.sent(counts, 0, "ring")


def test_a_link_is_fitted():
    true = Link(2e-4, 3e9)
    found = report.fitted([[size, true.seconds(size)] for size in (64, 2**14, 2**20, 2**23)])
    assert found.latency == pytest.approx(2e-4) and found.bandwidth == pytest.approx(3e9)


def machine(overlap: float, **links: float) -> Measured:
    """So many seconds a byte of each kind; a product of one row by one, D = 1, takes 2 seconds."""
    return Measured(
        {kind: Link(0.0, 1 / links.get(kind, 1e-9)) for kind in report.KINDS},
        {"forward": 1.0, "backward": 1.0},
        overlap,
    )


def test_a_ring_hides_what_is_shorter_than_a_block():
    half = Half("forward", Trip(cargo=1, found=1, half=False, summed=True), rows=1, D=1, products=1, local=1)
    free = half.seconds(machine(1.0), "ring", 4)
    assert free == pytest.approx(4 * 2, rel=1e-6) and half.arithmetic(machine(1.0), 4) == 8
    # cargo, cargo, cargo and found beside a block of 2 s, and the way home beside nothing
    assert half.seconds(machine(1.0, swap=0.5), "ring", 4) == pytest.approx(8 + 0.5)
    assert half.seconds(machine(1.0, swap=3.0), "ring", 4) == pytest.approx(3 + 3 + 6 + 3 + 3)
    assert half.seconds(machine(0.0, swap=0.5), "ring", 4) == pytest.approx(8 + 6 * 0.5)


def test_a_gather_hides_behind_the_own_block_alone():
    half = Half("forward", Trip(cargo=1, found=1, half=False, summed=True), rows=1, D=1, products=1, local=1)
    assert half.seconds(machine(1.0, gather=0.5), "gather", 4) == pytest.approx(8)
    assert half.seconds(machine(1.0, gather=2.0), "gather", 4) == pytest.approx(6 + 6)


def test_a_ring_between_nodes_has_one_card_and_a_collective_all():
    cluster = Cluster(step=0.0)
    sent = 1e9
    assert cluster.seconds("swap", sent, 8) < cluster.seconds("swap", sent, 16) / 8
    share = (64 - 8) / 63 / (8 * 50e9)
    assert cluster.seconds("gather", sent, 64) == pytest.approx(20e-6 + max(share, 1 / 450e9) * sent)


def test_predictions():
    for shape in predict.SHAPES:
        for world in predict.GPUS:
            found = predict.predicted(shape, world)
            assert all(f.seconds >= f.arithmetic for f in found.values())
            assert found["ring"].sent <= 4 / 3 * found["gather"].sent + 1  # which has kept the keys
        if shape.loss != "barlow_twins_loss":  # by columns in so large a world
            assert found["ring"].memory < found["gather"].memory / 100
    large = predict.predicted(predict.SHAPES[2], 1024)
    assert large["ring"].seconds < large["gather"].seconds, "transfers of a ring hide behind blocks of 8,192 rows"
    assert "not measured yet" in predict.constants_table()
    assert report.predicted_table().count("\n") == 1 + len(predict.SHAPES) * len(predict.GPUS)


def test_arithmetic_is_that_of_one_process_divided():
    for loss in traffic.TRIPS:
        for half in model.halves(loss, 64, 1024, 4, world=4):
            alone = Half(half.part, half.trip, half.rows * 4, half.D, half.products, half.local)
            assert half.arithmetic(machine(1.0), 4) * 4 == pytest.approx(alone.arithmetic(machine(1.0), 1))
