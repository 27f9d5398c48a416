# SPDX-License-Identifier: Apache-2.0
"""A rank that brings something else, fails or dies is an error on every other rank, which names it, and in time."""

from __future__ import annotations

import inspect
import re

import fault_cases
import pytest
from fault_cases import DEATHS, TIMEOUT, Outcome

from sslkernels import losses

MARGIN = 3.0  # seconds, for a busy machine

# What every rank says of rank 2, which is 3 of the subgroup (1, 3).
DISAGREEMENTS = {
    "width": r"the ranks disagree on out0: float32 \(rows, 4\) .* on rank.*; float32 \(rows, 5\) .* on rank {}$",
    "dtype": r"out0: float32 .*; float64 \(rows, 4\) on cpu, requires_grad on rank {}$",
    "requires_grad": r"out0: .* on cpu, requires_grad on ranks? .*; float32 \(rows, 4\) on cpu on rank {}$",
    "loss": r"the ranks call different losses: nt_xent on ranks? .*; dcl on rank {}$",
    "temperature": r"nt_xent: the ranks disagree on temperature: 0.5 on ranks? .*; 0.25 on rank {}$",
    "learned": r"temperature: 0.5 on ranks? .*; float32 \(\) on cpu on rank {}$",
    "parameter": r"temperature: float32 \(\) on cpu, requires_grad on ranks? .*; float32 \(\) on cpu on rank {}$",
    "weights": r"sample_weight: None on ranks? .*; float32 \(rows,\) on cpu on rank {}$",
    "reduction": r"reduction: 'mean' on ranks? .*; 'sum' on rank {}$",
    "strategy": r"strategy: 'gather' on ranks? .*; 'ring' on rank {}$",
    "autocast": r"autocast: None on ranks? .*; 'torch.bfloat16' on rank {}$",
    "check": r"check: 'step' on ranks? .*; 'first' on rank {}$",
}
OWN_ERRORS = {  # of a rank, which the others must hear of
    "empty": "ValueError in nt_xent: out0 must not be an empty batch, got shape (0, 4)",
    "views": "ValueError in nt_xent: out1 must have the shape of out0 (8, 4), got (7, 4)",
}


@pytest.mark.parametrize("group", ["4", "subgroup"])
@pytest.mark.parametrize("change", DISAGREEMENTS)
def test_disagreement(ranks, change, group):
    odd, name = (2, 2) if group == "4" else (1, 3)
    for outcome in ranks.run(fault_cases.step, group, change, odd):
        assert outcome.error == "RuntimeError"
        assert re.search(DISAGREEMENTS[change].format(name), outcome.message), outcome.message
    assert ranks.run(fault_cases.step, group, "", odd)[0].error == ""  # the group is as good as before


@pytest.mark.parametrize("change", OWN_ERRORS)
def test_error_of_one_rank(ranks, change):
    outcomes = ranks.run(fault_cases.step, "4", change, 2)
    odd = outcomes.pop(2)
    assert f"{odd.error} in nt_xent: {odd.message}" == OWN_ERRORS[change]
    for outcome in outcomes:
        assert outcome.error == "RuntimeError"
        assert outcome.message == f"rank 2 raised {OWN_ERRORS[change]}"
    assert ranks.run(fault_cases.step, "4", "", 2)[0].error == ""


def test_rows_of_a_matrix(ranks):
    outcomes = ranks.run(fault_cases.other_vocabulary, "2")
    for outcome in outcomes:
        assert outcome.error == "RuntimeError"
        assert "disagree on the rows of weight: 10 on rank 0; 11 on rank 1" in outcome.message, outcome.message


def test_every_loss_tells_others_of_its_errors():
    functions = [f for f in vars(losses).values() if inspect.isfunction(f)]
    spanning = [f for f in functions if "process_group" in inspect.signature(f).parameters]
    assert len(spanning) > 20 and [f.__name__ for f in spanning if not hasattr(f, "__wrapped__")] == []


def test_error_of_all_ranks(ranks):
    def own(odd: int) -> list[Outcome]:
        return ranks.run(fault_cases.step, "2", "all empty", odd)

    assert {outcome.error for outcome in own(0)} == {"ValueError"}
    assert ranks.run(fault_cases.step, "2", "", 0)[0].error == ""


@pytest.fixture(scope="module")
def survivors() -> dict[str, dict[int, Outcome]]:
    return fault_cases.deaths()


@pytest.mark.parametrize("name", DEATHS)
def test_death(survivors, name):
    death, outcomes = DEATHS[name], survivors[name]
    assert set(outcomes) == set(death.members) - {death.rank}
    for outcome in outcomes.values():
        assert outcome.error == "RuntimeError"
        if death.tcp:  # nobody is left to tell who died, but for the one who told
            assert "the group's store does not answer: the process that holds it, rank 0 unless" in outcome.message
        else:
            assert outcome.message.startswith(f"rank {death.rank} did not answer within 3 s"), outcome.message
        assert outcome.seconds < TIMEOUT * (1 if death.hangs else 0) + TIMEOUT / 2 + MARGIN
