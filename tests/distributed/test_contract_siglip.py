# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from contract import EVEN, STRATEGIES, UNEVEN, Setting, check

VARIANTS = ["siglip_sum", "siglip_smoothed", "siglip_weighted", "siglip_rows"]


def contract(ranks, name, group, setting, **options):
    check(ranks, name, group, setting, module="siglip_cases", **options)


@pytest.mark.parametrize("group", ["2", "3", "4", "subgroup"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_loss_and_gradients_are_those_of_one_process(ranks, sizes, strategy, group):
    contract(ranks, "siglip", group, Setting(sizes, strategy))


@pytest.mark.parametrize("group", ["3", "subgroup"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(ranks, name, strategy, group):
    contract(ranks, name, group, Setting(UNEVEN, strategy))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["siglip", "siglip_rows"])
def test_batches_of_one_size_compared_once(ranks, name, strategy, compiled):
    contract(ranks, name, "3", Setting(EVEN, strategy, "first", compiled))


@pytest.mark.parametrize("name", ["siglip", "siglip_rows"])
def test_uneven_batches_compiled(ranks, name):
    contract(ranks, name, "3", Setting(UNEVEN, "ring", compiled=True))


@pytest.mark.parametrize("name", ["siglip", "siglip_weighted"])
def test_gradients_accumulate(ranks, name):
    contract(ranks, name, "2", Setting(UNEVEN, "ring", micro_batches=3))
