# SPDX-License-Identifier: Apache-2.0
"""Losses over a vocabulary: cross-entropy of a linear layer's logits, word vectors."""

from sslkernels.ops._linear_cross_entropy import linear_cross_entropy
from sslkernels.ops._skipgram import skipgram
from sslkernels.ops._skipgram_update import AliasTable, alias_table, skipgram_update_

__all__ = ["AliasTable", "alias_table", "linear_cross_entropy", "skipgram", "skipgram_update_"]
