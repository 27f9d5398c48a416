# SPDX-License-Identifier: Apache-2.0
"""Micro-batches on several ranks against one graph in one process: the contract, with one average a step."""

from __future__ import annotations

import cached_cases as cases
import pytest
import torch
from ranks import GROUPS

EVEN, UNEVEN = (7, 7, 7), (2, 8, 3)  # rows of each rank, 3 at a time


def check(ranks, group, sizes, returned, steps=1, strategy="gather", **options):
    sizes = sizes[: len(GROUPS[group])]
    loss, expected = cases.alone(sizes, returned, steps)
    compare(ranks.run(cases.step, group, sizes, returned, steps, strategy, options), loss, expected)


def compare(outcomes, loss, expected):
    torch.testing.assert_close(torch.stack([found for found, *_ in outcomes]).mean(), loss, rtol=1e-12, atol=0)
    for _, found, averages in outcomes:
        assert averages == 1
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("returned", [True, False], ids=["temperature returned", "temperature of the loss"])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("group", ["2", "3", "subgroup"])
def test_loss_and_gradients_are_those_of_one_process(ranks, group, sizes, returned):
    check(ranks, group, sizes, returned, strategy="ring" if group == "3" else "gather")


def test_a_function_over_a_wrapped_module_averages_once_too(ranks):
    loss, expected = cases.alone(UNEVEN, False, 1)
    expected = {name.removeprefix("encoder."): x for name, x in expected.items() if name != "temperature"}
    compare(ranks.run(cases.function_step, "3", UNEVEN), loss, expected)


@pytest.mark.parametrize("returned", [True, False], ids=["temperature returned", "temperature of the loss"])
def test_gradients_accumulate_under_no_sync(ranks, returned):
    check(ranks, "2", UNEVEN, returned, steps=3)


@pytest.mark.parametrize("options", [{"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_kinds_of_averaging(ranks, options):
    check(ranks, "2", UNEVEN, True, steps=2, **options)


@pytest.mark.parametrize(
    "options, message", [({"static_graph": True}, "static_graph"), ({"find_unused_parameters": True}, "find_unused")]
)
def test_refuses_what_would_be_averaged_wrongly(ranks, options, message):
    assert all(message in found for found in ranks.run(cases.refused, "2", options))
