# SPDX-License-Identifier: Apache-2.0
"""A linear classifier on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.evaluation._checks import split


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ridge: float = 1e-2,
) -> float:
    """Share of test items that a linear classifier, fitted to the training items, names rightly.

        x = (features - mean) / std                 per dimension, over the training items, as MAE's batch norm does
        W = argmin mean |x W + c - onehot|^2 + ridge |W|^2,   the class is argmax(x W + c)

    Solved exactly, in float64: no learning rate and no epochs, so two features are compared under equal terms.
    Features (N, D) and (M, D) need not be normalized; labels are (N,) and (M,) class indices.

    Example:
        >>> train, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
        >>> linear_probe(train, labels, torch.eye(3), torch.arange(3))
        1.0
    """
    split(train_features, train_labels, test_features, test_labels)
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    train, test = train_features.double(), test_features.double()
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(train_labels.max()) + 1
    onehot = F.one_hot(train_labels, classes).to(train.dtype)
    share = onehot.mean(dim=0)  # the intercept, as the training features are centred
    n, d = train.shape
    if d <= n:
        gram = train.T @ train + n * ridge * torch.eye(d, dtype=train.dtype, device=train.device)
        weight = torch.linalg.solve(gram, train.T @ (onehot - share))
    else:
        gram = train @ train.T + n * ridge * torch.eye(n, dtype=train.dtype, device=train.device)
        weight = train.T @ torch.linalg.solve(gram, onehot - share)
    return float(((test @ weight + share).argmax(dim=1) == test_labels).double().mean())
