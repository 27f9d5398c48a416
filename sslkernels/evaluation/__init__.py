# SPDX-License-Identifier: Apache-2.0
"""What frozen features are worth: the accuracy of k nearest neighbours, and of a linear classifier."""

from __future__ import annotations

from sslkernels.evaluation.features import extract_features
from sslkernels.evaluation.knn import knn_accuracy
from sslkernels.evaluation.metrics import spread, std_of_rows
from sslkernels.evaluation.probe import linear_probe

__all__ = ["extract_features", "knn_accuracy", "linear_probe", "spread", "std_of_rows"]
