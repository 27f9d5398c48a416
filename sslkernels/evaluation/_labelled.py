# SPDX-License-Identifier: Apache-2.0
"""Features with labels: what they must be, and how they come in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sslkernels import _checks as check

Batches = Iterable[tuple[Tensor, Tensor]]


def labelled(features: Tensor, labels: Tensor, name: str = "") -> None:
    """`{name}features` (N, D), floating, and `{name}labels` (N,), int64, from 0."""
    check.features(**{f"{name}features": features})
    check.vector(f"{name}labels", labels, len(features), features, (torch.int64,))
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"{name}labels must be class numbers from 0, got {int(labels.min())}")


def train_and_test(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    labelled(train_features, train_labels, "train_")
    labelled(test_features, test_labels, "test_")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            "train_features and test_features must be (N, D) and (M, D), got "
            f"{tuple(train_features.shape)} and {tuple(test_features.shape)}"
        )
    for name, features in (("train_features", train_features), ("test_features", test_features)):
        check.not_empty(name, features)


def batches(features: Tensor | Batches, labels: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked pairs: two tensors in pieces of `size` items, or what an iterable of pairs gives (labels None then)."""
    if isinstance(features, Tensor) != (labels is not None):
        raise TypeError("labels must come with a tensor of features, and be part of the pairs of an iterable")
    pairs: Batches = [(features, labels)] if isinstance(features, Tensor) and labels is not None else features
    for some_features, some_labels in pairs:
        labelled(some_features, some_labels)
        yield from zip(some_features.split(size), some_labels.split(size), strict=True)
