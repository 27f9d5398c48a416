# SPDX-License-Identifier: Apache-2.0
"""Losses over the features of all ranks' rows: their numbers, what they send, what others make of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import redundancy_cases as cases
import torch
from torch import Tensor

from sslkernels.distributed import _product

F64 = torch.float64
SIZES = (7, 3, 6)


def pair(n: int, d: int, dtype: torch.dtype = F64, grow: Sequence[int] = SIZES) -> list[Tensor]:
    """Two views whose rows grow from rank to rank."""
    a = torch.randn(n, d, dtype=F64) * torch.cat([torch.full((size, 1), 1.0 + r) for r, size in enumerate(grow)])
    return [(0.7 * x + 0.2).to(dtype).requires_grad_() for x in (a, a + 0.3 * torch.randn(n, d, dtype=F64))]


def alone(name: str, batch: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """In float64, in one process."""
    wide = [x.detach().to(F64).requires_grad_() for x in batch]
    loss = cases.LOSSES[name](*wide)
    return loss.detach(), list(torch.autograd.grad(loss, wide))


def errors(outcomes: list[cases.Outcome], name: str, batch: Sequence[Tensor]) -> tuple[float, float]:
    """Of the mean of the losses, and the largest of a view's gradients, for the mean of the losses."""
    exact, gradients = alone(name, batch)
    loss = torch.stack([x.loss for x in outcomes]).to(F64).mean()
    worst = 0.0
    for view, gradient in zip(batch, zip(gradients, *(x.gradients for x in outcomes))):
        if view.requires_grad:
            found = torch.cat([x.to(F64) for x in gradient[1:]]) / len(outcomes)
            worst = max(worst, float((found - gradient[0]).norm() / gradient[0].norm()))
    return float((loss - exact).abs() / exact.abs()), worst


def run(
    ranks: Any,
    name: str,
    batch: Sequence[Tensor],
    sizes: Sequence[int] = SIZES,
    weights: Sequence[float] | None = None,
    panel_bytes: int = _product.PANEL_BYTES,
    **options: Any,
) -> list[cases.Outcome]:
    return ranks.run(cases.of_rows, str(len(sizes)), name, list(batch), sizes, weights, panel_bytes, options)


@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_float32(ranks, name, width):
    value, gradient = errors(run(ranks, name, batch := pair(16, width, torch.float32)), name, batch)
    assert value <= 1e-5 and gradient <= 1e-5


@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_autocast_changes_nothing(ranks, name, width):
    batch = pair(16, width, torch.float32)
    plain, under = run(ranks, name, batch), run(ranks, name, batch, autocast=True)
    for x, y in zip(plain, under):
        assert torch.equal(x.loss, y.loss) and all(map(torch.equal, x.gradients, y.gradients))


@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_nan_of_one_rank_is_nan_on_all(ranks, name, width):
    batch = pair(16, width)
    batch[0].data[2, 3] = torch.nan
    for outcome in run(ranks, name, batch):
        # TiCo's ranks return their own rows' parts, which meet the others' through its covariance
        assert outcome.loss.isnan() and outcome.gradients[0][:, 3].isnan().any()


@pytest.mark.parametrize("shift", [0, 30])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_16_bits_travel_and_float32_computes(ranks, name, strategy, shift):
    """Rows are sent as they came, in half the bytes, and become what they are to their owner."""
    batch = [(x.detach() + shift).bfloat16().requires_grad_() for x in pair(16, 40)]
    outcomes = run(ranks, name, batch, strategy=strategy)
    value, gradient = errors(outcomes, name, batch)
    assert value <= 1e-5 and gradient <= 2 * torch.finfo(torch.bfloat16).eps
    rows = [x.bytes for x in outcomes[0].forward if x.name != "all_reduce" and x.bytes != 1024]
    assert rows[:2] == 2 * [7 * 40 * 2]


@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_a_mean_a_million_deviations_away(ranks, name, width):
    """Columns of mean 1e4 and deviation 1e-2, where float32 has 1e-3 between neighbours; the truth has them as well."""
    a = 1e4 + 1e-2 * torch.randn(16, width)
    batch = [x.requires_grad_() for x in (a, a + 1e-2 * torch.randn(16, width))]
    value, gradient = errors(run(ranks, name, batch), name, batch)
    assert value <= 1e-5 and gradient <= 1e-5


def test_a_norm_that_is_nearly_all_diagonal(ranks):
    """One column of a thousand times the deviation: what Gram space has left off the diagonal is rounding."""
    batch = pair(16, 40, torch.float32)
    for x in batch:
        x.data[:, 3] *= 1e4
    exact = [x.detach().requires_grad_() for x in batch]
    outcomes = run(ranks, "vicreg", exact)
    assert max(errors(outcomes, "vicreg", exact)) <= 1e-5
    assert any(x.bytes == 40 * 40 * 4 for x in outcomes[0].forward)  # all ranks went on to feature space


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "frossl"])
def test_panels(ranks, name):
    """Of three columns, the last of one: (D, D) products are summed one after the other."""
    width = 10 if name != "frossl" else 13
    batch = pair(16, width)
    outcomes = run(ranks, name, batch, panel_bytes=3 * width * 8)
    assert max(errors(outcomes, name, batch)) <= 1e-10
    products = [x for x in outcomes[0].forward if x.name == "all_reduce"]
    assert len(products) > 4


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "frossl"])
@pytest.mark.parametrize("width", [8, 40])
def test_one_view_without_gradient(ranks, name, width):
    batch = pair(16, width)
    batch[1] = batch[1].detach()
    outcomes = run(ranks, name, batch)
    assert all(x.gradients[1] is None for x in outcomes)
    assert max(errors(outcomes, name, batch)) <= 1e-10
    values = run(ranks, name, [x.detach() for x in batch])
    torch.testing.assert_close(values[0].loss, outcomes[0].loss)
    assert not values[0].backward


@pytest.mark.parametrize("width", [8, 40])
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_losses_of_other_weights_on_each_rank(ranks, name, width):
    """Every rank's loss is of all rows: their sum, so weighted, is what each differentiates."""
    batch, weights = pair(16, width), (0.5, -2.0, 4.0)
    outcomes = run(ranks, name, batch, weights=weights)
    for view, exact in enumerate(alone(name, batch)[1]):
        found = torch.cat([x.gradients[view] for x in outcomes])
        torch.testing.assert_close(found, sum(weights) * exact)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "frossl"])
def test_a_rank_with_one_row_and_a_column_of_zeros(ranks, name):
    batch = pair(5, 12, grow=(4, 1))
    with torch.no_grad():
        for x in batch:
            x[:, 3] = 0.0
    outcomes = run(ranks, name, batch, (4, 1))
    assert max(errors(outcomes, name, batch)) <= 1e-10


class TestSent:
    """N = 16 rows, D = 40 columns, three ranks, float32 or float64."""

    def test_gathered_rows_send_no_gradient(self, ranks):
        outcomes = run(ranks, "barlow_twins", pair(16, 40, torch.float32))
        for outcome in outcomes:
            gathers = [x.bytes for x in outcome.forward if "gather" in x.name]
            # what the ranks compare; two views, padded to the longest batch
            assert gathers == [1024] + 2 * [max(SIZES) * 40 * 4]
            # means, moments, norm, and what comes through the deviations: columns, in float64
            sums = [x.bytes for x in outcome.forward if "gather" not in x.name]
            assert sums == [2 * 40 * 8, 5 * 40 * 8, 8, 2 * 40 * 8]
            assert [x.bytes for x in outcome.backward] == [4]

    @pytest.mark.parametrize("strategy", ["ring", "bidirectional_ring"])
    def test_rows_around_a_ring_are_sent_once_a_hop(self, ranks, strategy):
        outcomes = run(ranks, "vicreg", pair(16, 40), strategy=strategy)
        for rank, outcome in enumerate(outcomes):
            hops = [x.bytes for x in outcome.forward if x.name == "batch_isend_irecv"]
            passed = (rank + 1) % 3 if strategy == "ring" else rank
            assert hops == [n * 40 * 8 for n in (SIZES[rank], SIZES[passed]) for _ in range(2)]
            assert [x.bytes for x in outcome.backward] == [8]

    def test_symmetric_products_send_what_lies_right_of_their_diagonal(self, ranks):
        outcome = run(ranks, "vicreg", pair(16, 8), panel_bytes=4 * 8 * 8)[0]
        products = [x.bytes for x in outcome.forward if x.name == "all_reduce"][2:]
        assert products == 2 * [4 * 8 * 8, 4 * 4 * 8]
        assert [x.bytes for x in outcome.backward] == [8]


def test_tico_has_one_covariance(ranks):
    """The same bits on every rank, batch after batch."""
    outcomes = ranks.run(cases.tico_covariance, "3", pair(16, 8), SIZES)
    assert all(torch.equal(x, outcomes[0]) for x in outcomes)


def test_gather_distributed_is_the_default_group(ranks):
    batch = pair(16, 40, grow=(4, 4, 4, 4))
    outcomes = ranks.run(cases.gathered_modules, "4", batch)
    for loss, values in zip(cases.MODULES, zip(*outcomes)):
        torch.testing.assert_close(torch.stack(values).mean(), loss()(*batch).detach())


def test_lightly_standardises_each_rank_alone(ranks):
    """On two ranks of other magnitude its gradient has a cosine of 0.83 to that of one process, and ours of 1."""
    batch = pair(16, 8, grow=(8, 8))
    exact = torch.cat(alone("barlow_twins", batch)[1]).flatten()
    outcomes = {
        "lightly": ranks.run(cases.lightlys_barlow_twins, "2", batch),
        "ours": [x.gradients for x in run(ranks, "barlow_twins", batch, (8, 8))],
    }
    cosine = {
        name: float(torch.cosine_similarity(torch.cat([torch.cat(v) for v in zip(*found)]).flatten(), exact, dim=0))
        for name, found in outcomes.items()
    }
    assert cosine["ours"] > 1 - 1e-12
    assert cosine["lightly"] < 0.99


@pytest.mark.parametrize(("strategy", "even"), [("gather", True), ("ring", False)])
def test_opcheck(ranks, strategy, even):
    ranks.run(cases.opcheck, "2", strategy, even)
