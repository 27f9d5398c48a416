# SPDX-License-Identifier: Apache-2.0
"""Checks that the parts of an evaluation share."""

from __future__ import annotations

from torch import Tensor


def split(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    """Features (N, D) and (M, D), M > 0, and a label for each."""
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            "train_features and test_features must be (N, D) and (M, D), got "
            f"{tuple(train_features.shape)} and {tuple(test_features.shape)}"
        )
    if train_labels.shape != train_features.shape[:1] or test_labels.shape != test_features.shape[:1]:
        raise ValueError(
            f"labels must be ({len(train_features)},) and ({len(test_features)},), got "
            f"{tuple(train_labels.shape)} and {tuple(test_labels.shape)}"
        )
    if not len(test_features):
        raise ValueError("test_features is empty")
