# SPDX-License-Identifier: Apache-2.0
"""Losses over the features of a batch that several ranks hold."""

from __future__ import annotations

from functools import partial

import contract
import pytest
from contract import EVEN, STRATEGIES, UNEVEN, Setting

check = partial(contract.check, module="redundancy_cases")

NARROW = ["barlow_narrow", "vicreg_narrow", "frossl_narrow", "tico", "tico_through"]  # sums of (D, D)
WIDE = ["barlow_wide", "vicreg_wide", "vicreg_positions", "frossl_wide"]  # rows travel


@pytest.mark.parametrize("group", ["2", "3", "4", "subgroup"])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_loss_and_gradients_are_those_of_one_process(ranks, name, sizes, group):
    check(ranks, name, group, Setting(sizes))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("name", WIDE)
def test_rows_around_a_ring(ranks, name, strategy):
    check(ranks, name, "4", Setting(UNEVEN, strategy))


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_batches_of_one_size_compared_once(ranks, name):
    check(ranks, name, "3", Setting(EVEN, check="first"))


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_compiled(ranks, name):
    check(ranks, name, "2", Setting(UNEVEN, "ring", compiled=True))


@pytest.mark.parametrize("name", ["barlow_narrow", "barlow_wide"])
def test_batches_of_one_size_compiled(ranks, name):
    check(ranks, name, "2", Setting(EVEN, check="first", compiled=True))


@pytest.mark.parametrize("name", [*NARROW, *WIDE])
def test_gradients_accumulate(ranks, name):
    check(ranks, name, "2", Setting(UNEVEN, micro_batches=3))


def test_more_views_than_have_their_rows_compared(ranks):
    check(ranks, "frossl_many_narrow", "3", Setting(UNEVEN))
