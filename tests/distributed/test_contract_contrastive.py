# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from contract import EVEN, STRATEGIES, UNEVEN, Setting, check

NAMES = ["nt_xent", "dcl"]


@pytest.mark.parametrize("group", ["2", "3", "4", "subgroup"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_one_process(ranks, name, sizes, strategy, group):
    check(ranks, name, group, Setting(sizes, strategy))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_batches_of_one_size_compared_once(ranks, name, strategy, compiled):
    check(ranks, name, "3", Setting(EVEN, strategy, "first", compiled))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_uneven_batches_compiled(ranks, name, strategy):
    check(ranks, name, "3", Setting(UNEVEN, strategy, compiled=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate(ranks, name):
    check(ranks, name, "2", Setting(UNEVEN, "ring", micro_batches=3))
