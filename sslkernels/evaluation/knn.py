# SPDX-License-Identifier: Apache-2.0
"""The vote of the nearest neighbours among frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.evaluation._checks import split


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Share of test items whose class wins the vote of their k nearest training items, as DINO counts it.

    Features (N, D) and (M, D) are L2-normalised here; a neighbour at cosine s votes exp(s / temperature) for its
    class (labels (N,) and (M,), int64, from 0). Ties go to the smaller class.

    Source: facebookresearch/dino `eval_knn.py`, without its fixed 1,000 classes and its 100 chunks.

    Example:
        >>> eye = torch.eye(4)
        >>> knn_accuracy(eye, torch.arange(4), eye + 0.1, torch.arange(4), k=1)
        1.0
    """
    split(train_features, train_labels, test_features, test_labels)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k must be between 1 and the {len(train_features)} training items, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    keys = F.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    correct = 0
    for features, labels in zip(test_features.split(chunk_size), test_labels.split(chunk_size), strict=True):
        similarity, index = (F.normalize(features.float(), dim=1) @ keys.T).topk(k)  # (m, k)
        votes = similarity.new_zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[index], (similarity / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test_features)
