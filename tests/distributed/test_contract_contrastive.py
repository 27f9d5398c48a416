# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from contract import EVEN, STRATEGIES, UNEVEN, Setting, check

NAMES = ["nt_xent", "dcl", "info_nce", "clip_loss", "supcon"]
OPTIONS = [
    *("nt_xent_strided", "info_nce_strided", "clip_strided", "info_nce_frozen", "clip_frozen"),
    *("nt_xent_smooth", "nt_xent_hard", "nt_xent_weighted", "nt_xent_sum", "nt_xent_rows", "nt_xent_stats"),
    *("dcl_weights", "dclw", "dcl_stats"),
    *("info_nce_raw", "info_nce_smooth", "info_nce_hard", "info_nce_weighted", "info_nce_rows", "info_nce_stats"),
    *("info_nce_queue", "info_nce_queue_weighted", "info_nce_queue_and_batch", "info_nce_own"),
    *("info_nce_own_and_batch", "clip_smooth", "clip_weighted", "clip_rows", "clip_stats"),
    *("supcon_sorted", "supcon_views", "supcon_smooth", "supcon_weighted", "supcon_rows", "supcon_stats"),
]


# every strategy on every group, half of them with even batches and half with uneven ones
PLACES = [
    pytest.param(strategy, group, (EVEN, UNEVEN)[odd], id=f"{strategy}-{group}-{('even', 'uneven')[odd]}")
    for i, strategy in enumerate(STRATEGIES)
    for j, group in enumerate(["2", "3", "4", "subgroup"])
    for odd in [(i + j) % 2]
]


@pytest.mark.parametrize(("strategy", "group", "sizes"), PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_one_process(ranks, name, strategy, group, sizes):
    check(ranks, name, group, Setting(sizes, strategy))


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_with_one_row(ranks, name, strategy):
    check(ranks, name, "4", Setting((1, 4, 1, 2), strategy))


@pytest.mark.parametrize("setting", [Setting(EVEN, check="first"), Setting(UNEVEN, "ring")], ids=["gather", "ring"])
@pytest.mark.parametrize("name", [*NAMES, *OPTIONS])
def test_options(ranks, name, setting):
    check(ranks, name, "3", setting)


@pytest.mark.parametrize("name", [f"{name.removesuffix('_loss')}_table" for name in NAMES])
def test_features_of_16_bits(ranks, name):
    check(ranks, name, "3", Setting(UNEVEN, "ring", dtype=torch.bfloat16))


def test_features_of_16_bits_whose_gradients_cancel(ranks):
    """Rows that have most in common: what blocks of keys give is far larger than their sum."""
    check(ranks, "clip_alike", "4", Setting((64,) * 4, "ring", dtype=torch.bfloat16))


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip", "supcon"])
def test_float32_at_small_losses(ranks, name, strategy):
    check(ranks, f"{name}_trained", "3", Setting(UNEVEN, strategy, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("name", ["nt_xent", "clip", "supcon"])
def test_autocast(ranks, name):
    check(ranks, f"{name}_autocast", "3", Setting(UNEVEN, "ring", dtype=torch.float32), 2e-2)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "dclw", "info_nce", "clip", "siglip", "supcon"])
def test_modules_that_span_all_ranks(ranks, name):
    """`gather_distributed=True`, "world" or a `Group` of it; looked up at the call, so that they copy and pickle."""
    check(ranks, f"{name}_module", "4", Setting(UNEVEN))


@pytest.mark.parametrize("name", ["nt_xent", "dclw", "info_nce", "clip_loss", "supcon"])
def test_compiled(ranks, name):
    check(ranks, name, "3", Setting(UNEVEN, "ring", compiled=True))


@pytest.mark.parametrize("name", ["nt_xent", "clip_loss"])
def test_compiled_for_batches_of_one_size(ranks, name):
    check(ranks, name, "3", Setting(EVEN, "gather", "first", compiled=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate(ranks, name):
    check(ranks, name, "2", Setting(UNEVEN, "ring", micro_batches=3))
