# SPDX-License-Identifier: Apache-2.0
"""Means over the rows, tokens and frames of all ranks, however many of them count on each."""

from __future__ import annotations

import means_cases
import pytest
import torch
from contract import EVEN, STRATEGIES, UNEVEN, Setting, check

from sslkernels.losses import masked_lm_loss

MODULE = "means_cases"
ROWS = ["byol", "byol_of_frames", "cosine", "next_sentence", "cpc_sequence"]  # all of them count
COUNTED = [
    *("named_rows", "masked_rows", "taken_rows", "masked_lm", "taken_tokens", "causal_lm", "hubert", "hubert_both"),
    *("wav2vec2", "diversity", "wav2vec2_terms"),
]
SUMS = ["masked_lm_sum", "hubert_sum", "wav2vec2_sum"]


@pytest.mark.parametrize("group", ["2", "4", "subgroup"])
@pytest.mark.parametrize("name", [*ROWS, *COUNTED])
def test_uneven_ranks_of_which_one_has_nothing_that_counts(ranks, name, group):
    check(ranks, name, group, Setting(UNEVEN), module=MODULE)


@pytest.mark.parametrize("name", [*ROWS, *COUNTED])
def test_batches_of_one_size_compared_once(ranks, name):
    check(ranks, name, "3", Setting(EVEN, check="first"), module=MODULE)


@pytest.mark.parametrize("name", SUMS)
def test_sums(ranks, name):
    check(ranks, name, "3", Setting(UNEVEN), module=MODULE)


@pytest.mark.parametrize("name", ["byol", "masked_lm", "named_rows", "wav2vec2", "diversity", "cpc"])
def test_compiled(ranks, name):
    check(ranks, name, "2", Setting(UNEVEN, compiled=True), module=MODULE)


@pytest.mark.parametrize("name", ["byol", "masked_lm", "diversity", "cpc"])
def test_gradients_accumulate(ranks, name):
    check(ranks, name, "2", Setting(UNEVEN, micro_batches=3), module=MODULE)


@pytest.mark.parametrize("name", ["taken_rows", "masked_rows", "masked_lm", "causal_lm", "hubert"])
def test_a_rank_without_rows(ranks, name):
    check(ranks, name, "3", Setting((3, 0, 8)), module=MODULE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("group", ["2", "4", "subgroup"])
def test_cpc_tells_a_frame_from_those_of_all_ranks(ranks, group, sizes, strategy):
    check(ranks, "cpc", group, Setting(sizes, strategy), module=MODULE)


def test_sum_of_cpc(ranks):
    check(ranks, "cpc_sum", "3", Setting(UNEVEN), module=MODULE)


@pytest.mark.parametrize("name", ["byol", "masked_lm", "masked_rows", "hubert_both", "cpc"])
def test_bfloat16(ranks, name):
    check(ranks, name, "3", Setting(UNEVEN, dtype=torch.bfloat16), tolerance=2e-2, module=MODULE)


@pytest.mark.parametrize("name", ["masked_lm", "hubert", "masked_rows", "wav2vec2"])
def test_where_nothing_counts_on_any_rank_a_mean_is_that_of_one_process(ranks, name):
    expected, gradients = means_cases.without_a_count(None, name)
    for loss, found in ranks.run(means_cases.without_a_count, "2", name):
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert loss.isnan() and found.keys() == gradients.keys()
        for key, gradient in found.items():
            assert torch.equal(gradient, torch.zeros_like(gradient)) and torch.equal(gradient, gradients[key])


def test_diversity_of_no_frames_on_any_rank(ranks):
    """That of probabilities of 0, which `GumbelVectorQuantizer` returns of none, as in one process."""
    expected, gradients = means_cases.without_a_count(None, "diversity")
    assert expected.isfinite()
    for loss, found in ranks.run(means_cases.without_a_count, "2", "diversity"):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("check", ["step", "first"])
def test_lengths_that_change_on_one_rank(ranks, check):
    """What is compared once has no length, so that no rank compares again while another does not."""
    steps = [(4, 7), (9, 7), (9, 2)]
    outcomes = zip(*ranks.run(means_cases.lengths_that_change, "2", steps, check))
    for step, (lengths, values) in enumerate(zip(steps, outcomes)):
        parts = [means_cases.tokens(step, rank, lengths) for rank in range(2)]
        hidden, labels = (torch.cat([part[i].flatten(0, 1) for part in parts]) for i in (0, 2))
        torch.testing.assert_close(torch.stack(values).mean(), masked_lm_loss(hidden, parts[0][1], labels))


def test_a_module_hands_its_group_on(ranks):
    for found in ranks.run(means_cases.modules_and_functions, "2"):
        for module, function in found.values():
            torch.testing.assert_close(module, function, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["masked_lm", "masked_regression", "wav2vec2_seed", "wav2vec2_generator", "wav2vec2_penalty"]
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks, name):
    other, own = ranks.run(means_cases.wrong_on_one_rank, "2", name)
    kind = "TypeError" if name == "wav2vec2_seed" else "ValueError"
    assert own.startswith(kind) and f"rank 1 raised {kind}" in other


def test_sums_beyond_float16_are_divided_before_they_are_rounded(ranks):
    expected, gradients = means_cases.large_sums(None)
    for loss, found in ranks.run(means_cases.large_sums, "2"):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, gradients)


def test_a_cosine_over_the_rows_of_all_ranks_is_refused(ranks):
    assert all("dim must not be that of the rows" in text for text in ranks.run(means_cases.cosine_of_the_rows, "2"))
