# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the masks, thread by thread on the CPU: the bits of the reference and of the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels.reference import _masks_sequence as sequence
from sslkernels.reference import masks as grid

SEEDS = (7, -3, 2**63 - 1)
LOGS = (math.log(0.3), -math.log(0.3))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(5, 900, (batch, length))


def word_ids(batch: int, length: int) -> Tensor:
    """Words of about two pieces, and a few tokens that belong to none."""
    ids = torch.randint(2, (batch, length)).cumsum(1)
    return ids.masked_fill(torch.rand(batch, length) < 0.05, -1)


def check(emulated: Callable, name: str, seed: int, *arguments: Any) -> None:
    """The kernel's outputs have the bits of the reference's; the CPU's kernel is compared with that in tests/ops."""
    given = torch.tensor(seed)
    reference = getattr(grid, name, None) or getattr(sequence, name)
    before = [x.clone() for x in arguments if isinstance(x, Tensor)]
    expected, got = reference(given, *arguments), emulated(name, given, *arguments)
    pairs = [(got, expected)] if isinstance(expected, Tensor) else list(zip(got, expected, strict=True))
    for x, y in pairs:
        assert (x.dtype, x.shape, x.is_contiguous()) == (y.dtype, y.shape, True)
        assert torch.equal(x, y)
    assert all(map(torch.equal, before, [x for x in arguments if isinstance(x, Tensor)]))


@pytest.mark.parametrize(
    ("batch", "frames", "places", "keep"),
    [
        (3, 1, 196, 49),
        (2, 3, 257, 64),  # one place more than a block has threads
        (2, 1, 2, 1),
        (2, 2, 31, 0),
        (2, 2, 31, 31),
        (0, 1, 196, 49),
        (1, 1, 13_000, 3000),  # more than shared memory holds
    ],
)
def test_random(emulated: Callable, batch: int, frames: int, places: int, keep: int) -> None:
    for seed in SEEDS:
        check(emulated, "random_mask", seed, batch, frames, places, keep)


def test_equal_keys(emulated: Callable) -> None:
    """A key occurs twice, and only one of its places is kept: the earlier."""
    keys = grid.words(torch.tensor(8), grid.RANDOM, 1, 0, torch.arange(300_000))[0]
    ordered = keys.sort().values
    first = int((ordered[1:] == ordered[:-1]).nonzero()[0])
    check(emulated, "random_mask", 8, 1, 1, 300_000, first + 1)


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_block(emulated: Callable, slices: bool, whole: bool) -> None:
    check(emulated, "block_mask", 5, 37, 9, 8, 0.1, 0.5, 4.0, 36.0, *LOGS, 10, 0.5, slices, whole)
    check(emulated, "block_mask", 6, 4, 2, 13, 0.02, 0.9, 1.0, 60.0, *LOGS, 3, 0.9, slices, whole)


def test_block_of_published_masks(emulated: Callable) -> None:
    check(emulated, "block_mask", 5, 8, 37, 37, 0.1, 0.5, 4.0, 684.0, *LOGS, 10, 0.5, True, True)  # DINOv2
    check(emulated, "block_mask", 5, 8, 14, 14, 75 / 196, 75 / 196, 16.0, 196.0, *LOGS, 10, 1.0, False, True)  # BEiT
    check(emulated, "block_mask", 5, 0, 14, 14, 0.1, 0.5, 16.0, 196.0, *LOGS, 10, 1.0, True, False)


@pytest.mark.parametrize("keep", [0, 1, 20, 39, 56])
def test_inverse_block(emulated: Callable, keep: int) -> None:
    check(emulated, "inverse_block_mask", 3, 5, 7, 8, 6, 3, keep)
    check(emulated, "inverse_block_mask", 4, 2, 7, 8, 0, 7, keep)


LENGTHS = [None, torch.tensor([150, 0, 3, 77])]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "lengths"])
@pytest.mark.parametrize("span", [1, 10, 150])
def test_spans(emulated: Callable, lengths: Tensor | None, span: int) -> None:
    for seed, ratio in zip(SEEDS, (0.65, 0.2, 0.9)):
        check(emulated, "span_mask", seed, 4, 150, lengths, ratio, span, 2)
        check(emulated, "centred_span_mask", seed, 4, 150, lengths, ratio, (ratio + 0.05) / span, span)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "lengths"])
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("longest", [0, 3, 300])
def test_word_spans(emulated: Callable, lengths: Tensor | None, words: bool, longest: int) -> None:
    thresholds = [2**32 - 2**32 // (i + 2) for i in range(longest)]  # more than one launch carries
    ids = word_ids(4, 150) if words else None
    check(emulated, "word_span_mask", 7, 4, 150, lengths, ids, 0.3, thresholds)


def test_a_sample_beyond_shared_memory(emulated: Callable) -> None:
    length = 20_000
    check(emulated, "span_mask", 7, 2, length, None, 0.05, 10, 0)
    check(emulated, "centred_span_mask", 7, 2, length, None, 0.5, 0.06, 10)
    check(emulated, "word_span_mask", 7, 1, length, None, word_ids(1, length), 0.001, [2**31])
    few = (None, 3, 1000, 0.01, 40, 0.8, 0.9, -100)
    check(emulated, "token_mask", 7, tokens(1, length), None, word_ids(1, length), *few)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "lengths"])
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("most", [1, 7, 151])
def test_tokens(emulated: Callable, lengths: Tensor | None, words: bool, special: bool, most: int) -> None:
    never = torch.rand(4, 150) < 0.2 if special else None
    ids = word_ids(4, 150) if words else None
    check(emulated, "token_mask", 7, tokens(4, 150), never, ids, lengths, 3, 1000, 0.15, most, 0.8, 0.9, -100)
    check(emulated, "token_mask", 8, tokens(4, 150), never, ids, lengths, 3, 1000, 0.9, most, 0.3, 0.5, -1)


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize(("length", "noise", "spans"), [(568, 85, 28), (2, 1, 1), (31, 15, 15), (257, 256, 1)])
def test_corruption(emulated: Callable, length: int, noise: int, spans: int, eos: int | None) -> None:
    check(emulated, "span_corruption", 7, tokens(3, length), noise, spans, 1000, eos)
    check(emulated, "span_corruption", 7, tokens(0, length), noise, spans, 1000, eos)


def test_strides(emulated: Callable) -> None:
    given, words, special = tokens(6, 80), word_ids(6, 80), torch.rand(6, 80) < 0.2
    views = [x.t().contiguous().t()[::2, 1::2] for x in (given, special, words)]
    lengths = torch.tensor([40, 3, 40, 9, 21, 9])[::2]
    check(emulated, "token_mask", 1, *views, lengths, 3, 1000, 0.15, 41, 0.8, 0.9, -100)
    check(emulated, "span_corruption", 1, views[0], 6, 2, 1000, 1)
    check(emulated, "word_span_mask", 1, 3, 40, lengths, words[:1, ::2].expand(3, 40), 0.2, [2**31])
