# SPDX-License-Identifier: Apache-2.0
"""Tokens in plain differentiable PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise.
"""

from sslkernels.reference._linear_cross_entropy import linear_cross_entropy
from sslkernels.reference._skipgram import AliasTable, Pairs, alias_table, skipgram, skipgram_update_, training_pairs

__all__ = [
    "AliasTable",
    "Pairs",
    "alias_table",
    "linear_cross_entropy",
    "skipgram",
    "skipgram_update_",
    "training_pairs",
]
