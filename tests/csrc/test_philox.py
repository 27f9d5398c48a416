# SPDX-License-Identifier: Apache-2.0
"""The random words are Philox4x32-10's, the same in C++ and in the reference."""

from __future__ import annotations

import pytest
import torch

from sslkernels.reference import _philox

# the known-answer vectors that Random123 ships: counter (block, stream) and key (seed) of zeros, ones and digits of pi
KNOWN = [
    (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (2**64 - 1, 2**64 - 1, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        0x299F31D0A4093822,
        0x0370734413198A2E,
        0x85A308D3243F6A88,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("seed, stream, block, words", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(module, seed, stream, block, words):
    assert module.philox(seed, stream, block) == words


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


@pytest.mark.parametrize("seed, stream, block", [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**60), (2**40 + 7, 3, 2**33)])
def test_reference_has_the_same_words(module, seed, stream, block):
    index = torch.arange(4 * block, 4 * block + 4)
    got = _philox.words(torch.tensor(signed(seed)), torch.tensor(signed(stream)), index)
    assert got.tolist() == module.philox(seed, stream, block)


def test_uniform_and_below():
    word = torch.tensor([0, 255, 256, 2**31, 2**32 - 1])
    assert _philox.uniform(word).tolist() == [0.0, 0.0, 2**-24, 0.5, 1 - 2**-24]
    assert _philox.below(word, 10).tolist() == [0, 0, 0, 5, 9]
