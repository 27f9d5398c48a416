# SPDX-License-Identifier: Apache-2.0
"""Losses over a vocabulary: cross-entropy of a linear layer's logits, word vectors."""

from sslkernels.ops._linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
