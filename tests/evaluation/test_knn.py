# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from sslkernels.evaluation import knn_accuracy


def angles(*degrees: float) -> torch.Tensor:
    """Vectors at these angles, of different lengths: only the angle may count."""
    radians = torch.tensor(degrees) * (math.pi / 180)
    return torch.stack([radians.cos(), radians.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_neighbours_vote_by_similarity():
    """Of three neighbours, one at 10 degrees outweighs two at 40: exp((cos 10 - cos 40) / 0.07) = 22.9 > 2."""
    train, labels = angles(10, 40, 40, 170), torch.tensor([1, 0, 0, 2])
    query = angles(0)
    assert knn_accuracy(train, labels, query, torch.tensor([1]), k=3) == 1
    # At temperature 1 the weights are nearly equal, exp(0.22) = 1.2 < 2, and the majority wins.
    assert knn_accuracy(train, labels, query, torch.tensor([1]), k=3, temperature=1.0) == 0
    assert knn_accuracy(train, labels, query, torch.tensor([0]), k=3, temperature=1.0) == 1


def test_chunks_do_not_change_the_share():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 6, generator=generator), torch.randn(23, 6, generator=generator)
    labels, test_labels = torch.arange(50) % 4, torch.arange(23) % 4
    whole = knn_accuracy(train, labels, test, test_labels, k=7)
    assert 0 < whole < 1
    assert whole == knn_accuracy(train, labels, test, test_labels, k=7, chunk_size=5)
    # A class that only the test has can't be found, and is not an index out of range.
    assert knn_accuracy(train, labels, test, torch.full_like(test_labels, 9), k=7) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 11}, r"k must be in \[1, 10\], got 11"),
        ({"temperature": 0.0}, "temperature"),
        ({"test_features": torch.zeros(3, 5)}, r"\(10, 4\) and \(3, 5\)"),
        ({"test_features": torch.zeros(0, 4), "test_labels": torch.zeros(0, dtype=torch.long)}, "empty"),
        ({"train_labels": torch.zeros(9, dtype=torch.long)}, "labels"),
    ],
)
def test_refuses(change, match):
    arguments = {
        "train_features": torch.ones(10, 4),
        "train_labels": torch.zeros(10, dtype=torch.long),
        "test_features": torch.ones(3, 4),
        "test_labels": torch.zeros(3, dtype=torch.long),
        "k": 5,
    }
    with pytest.raises(ValueError, match=match):
        knn_accuracy(**{**arguments, **change})
