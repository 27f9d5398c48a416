# SPDX-License-Identifier: Apache-2.0
"""Pairs of words that stand together in a real corpus: what word vectors are trained on, and what they are held to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels import text
from sslkernels.methods.word2vec import flatten, keep_probability
from sslkernels.ops import alias_table
from sslkernels.reference.tokens import training_pairs

__all__ = ["WordData", "word_pairs"]


class WordData(NamedTuple):
    """Word ids (context word, centre word), (P, 2) int64, from two disjoint parts of every document."""

    train_pairs: Tensor
    test_pairs: Tensor
    words: Tensor  # (V,) all ids
    train_sentences: list[Tensor]
    test_sentences: list[Tensor]
    vocabulary: text.Vocabulary  # of the training part


@functools.cache
def word_pairs(
    documents: tuple[Sequence[str], ...] | None = None, *, min_count: int = 3, window: int = 5, seed: int = 0
) -> WordData:
    """Pairs as word2vec draws them, once: subsampled at 1e-3, windows of random width. Default: the Lee corpus.

    Documents are tuples of sentences, as `text.lee_background` and `text.head500` have them.

    Example:
        >>> data = word_pairs()
        >>> data.vocabulary.words[:3]
        ('the', 'to', 'of')
    """
    parts = text.split(text.lee_background() if documents is None else documents)
    sentences = [[text.words(s) for document in part for s in document] for part in parts]
    vocabulary = text.Vocabulary(sentences[0], min_count=min_count)
    ids = [[vocabulary.encode(s) for s in part] for part in sentences]
    keep, table = keep_probability(vocabulary.counts), alias_table(torch.ones(len(vocabulary)))
    pairs = []
    for number, part in enumerate(ids):
        drawn = training_pairs(*flatten(part), table, keep, torch.tensor(seed + number), window, 0)
        pairs.append(torch.stack((drawn.inputs, drawn.outputs), 1))
    return WordData(pairs[0], pairs[1], torch.arange(len(vocabulary)), ids[0], ids[1], vocabulary)
