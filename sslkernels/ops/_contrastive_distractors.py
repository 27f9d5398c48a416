# SPDX-License-Identifier: Apache-2.0
"""The distractors of wav2vec 2.0 as a table of counts."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.ops._registry import define
from sslkernels.reference import _distractors as reference

_counts = define(
    "distractor_counts(Tensor seed, Tensor lengths, SymInt length, SymInt count) -> Tensor",
    reference=reference.distractor_counts,
    fake=lambda seed, lengths, length, count: seed.new_empty(lengths.shape[0], length, length, dtype=torch.float32),
)


def distractor_counts(
    lengths: Tensor,
    length: int,
    num_distractors: int = 100,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Draws `num_distractors` other frames of its own sample for each frame, with replacement, and counts them.

        counts[b, i, j] = how often frame i of sample b drew frame j;  0 for j = i, and beyond lengths[b]

    A sum over the draws is a sum over frames weighted by their counts: with the products of all frames of a sample, one
    small matrix, nothing is gathered.

    Args:
        lengths: (B,) int64 in [0, length]: the frames of each sample that draw and are drawn. One alone draws nothing.
        length: L.
        generator, seed: as in `random_mask`.

    Returns:
        (B, L, L) float32.

    Raises:
        ValueError, TypeError: lengths of another rank or dtype; a number out of range; lengths outside of [0, length]
            on the CPU or under `check_values` (elsewhere they are clamped).

    Example:
        >>> counts = distractor_counts(torch.tensor([5, 3]), 5, 10)
        >>> counts.sum(2)
        tensor([[10., 10., 10., 10., 10.],
                [10., 10., 10.,  0.,  0.]])

    Source: Baevski et al. 2020; fairseq `models/wav2vec/wav2vec2.py::sample_negatives`.
    """
    check.tensor("lengths", lengths)
    check.vector("lengths", lengths, lengths.numel(), lengths, (torch.int64,))
    check.integer("length", length, 0, 2**31 - 1)
    check.integer("num_distractors", num_distractors, 1, 2**24)
    check.ids("lengths", lengths, length + 1)
    return _counts(seed_tensor(seed, generator, lengths.device), lengths, length, num_distractors)
