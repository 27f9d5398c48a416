# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import siglip_cases as cases
import torch
from contract import EVEN, STRATEGIES, UNEVEN, Setting, check
from ranks import GROUPS
from test_contract_contrastive import PLACES

OPTIONS = [
    *("siglip_smooth", "siglip_weighted", "siglip_learned", "siglip_rows", "siglip_stats", "siglip_strided"),
    *("siglip_frozen_texts", "siglip_frozen_images"),
    *("frozen_keys_smooth", "frozen_keys_hard", "frozen_keys_weighted", "frozen_keys_and_queue"),
]


def contract(ranks, name, group, setting, tolerance=None):
    check(ranks, name, group, setting, tolerance, module="siglip_cases")


@pytest.mark.parametrize(("strategy", "group", "sizes"), PLACES)
@pytest.mark.parametrize("name", ["siglip", "siglip_rows", "frozen_keys"])
def test_loss_and_gradients_are_those_of_one_process(ranks, name, strategy, group, sizes):
    contract(ranks, name, group, Setting(sizes, strategy))


@pytest.mark.parametrize("setting", [Setting(EVEN, check="first"), Setting(UNEVEN, "ring")], ids=["gather", "ring"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(ranks, name, setting):
    contract(ranks, name, "3", setting)


@pytest.mark.parametrize("setting", [Setting(EVEN, check="first"), Setting(UNEVEN, "ring")], ids=["gather", "ring"])
@pytest.mark.parametrize("name", ["siglip", "siglip_rows", "frozen_keys"])
def test_compiled(ranks, name, setting):
    contract(ranks, name, "3", setting._replace(compiled=True))


@pytest.mark.parametrize("name", ["siglip_table", "frozen_keys_table"])
def test_features_of_16_bits(ranks, name):
    contract(ranks, name, "3", Setting(UNEVEN, "ring", dtype=torch.bfloat16))


def test_autocast(ranks):
    contract(ranks, "siglip_autocast", "3", Setting(UNEVEN, "ring", dtype=torch.float32), 2e-2)


@pytest.mark.parametrize("name", ["siglip", "siglip_learned", "frozen_keys"])
def test_gradients_accumulate(ranks, name):
    contract(ranks, name, "2", Setting(UNEVEN, "ring", micro_batches=3))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "exchanges"),
    [("siglip", []), ("frozen keys", []), ("shards", []), ("rows of siglip", ["an exchange"])],
)
def test_what_backward_exchanges(ranks, name, exchanges, strategy):
    assert ranks.run(cases.backward_alone, "2", name, strategy) == [exchanges, exchanges]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["nothing", "diagonal", "labels", "other labels", "masked"])
def test_pairs_that_are_left_out(ranks, kind, strategy):
    sizes = list(UNEVEN[: len(GROUPS["3"])])
    found = ranks.run(cases.swept, "3", kind, strategy, sizes)
    for own, exact in zip(zip(*found), cases.swept(None, kind, strategy, sizes), strict=True):
        torch.testing.assert_close(torch.cat(own), exact, rtol=1e-12, atol=1e-13)
