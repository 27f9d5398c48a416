# SPDX-License-Identifier: Apache-2.0
"""What word vectors are worth: similarities beside people's judgements, and analogies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops import topk_similarity
from sslkernels.text import corpus

__all__ = ["WordScore", "context_accuracy", "spearman", "word_analogies", "word_similarity"]


class WordScore(NamedTuple):
    """A score, the questions it stands on, and how many there were with those whose words are not all known."""

    score: float
    known: int
    total: int


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks of two vectors, float64; equal values share the mean of their ranks. NaN if either is
    constant or has fewer than two values."""
    ranks = []
    for values in (x, y):
        _, group, sizes = values.double().unique(return_inverse=True, return_counts=True)
        ranks.append((sizes.cumsum(0) - (sizes - 1) / 2.0)[group].double())
    a, b = (r - r.mean() for r in ranks)
    return float(a @ b / (a.norm() * b.norm())) if len(x) else float("nan")


@torch.no_grad()
def word_similarity(vectors: Tensor, index: Mapping[str, int], path: Path | None = None) -> WordScore:
    """Spearman's correlation of cosines with people's scores, over the pairs whose words are both in `index`.

    Args:
        vectors: (V, D), floating.
        index: the row of each word, as `sslkernels.text.Vocabulary.index`.
        path: lines of word, word, score, separated by tabs, # in front of comments; None is SimLex-999, which gensim
            ships.

    Example:
        >>> score, known, total = word_similarity(torch.randn(2, 8), {"old": 0, "new": 1})
        >>> known, total
        (1, 999)

    Source: Hill et al. 2015 (arXiv:1408.3456).
    """
    check.features(vectors=vectors)
    rows = [line.split("\t") for line in _lines(corpus("simlex999.txt") if path is None else path)]
    known = [(index[a], index[b], float(score)) for a, b, score in rows if a in index and b in index]
    if not known:
        return WordScore(float("nan"), 0, len(rows))
    first, second, scores = (torch.tensor(column) for column in zip(*known))
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return WordScore(spearman((unit[first] * unit[second]).sum(1), scores), len(known), len(rows))


@torch.no_grad()
def word_analogies(vectors: Tensor, index: Mapping[str, int], path: Path | None = None) -> WordScore:
    """Share of the questions "a is to b as c is to?" whose answer is the nearest word to b - a + c (3CosAdd).

        answer = argmax over words w but a, b, c of cos(w, u_b - u_a + u_c)        u of unit length

    Questions count where all four words are in `index`, in any case of letters.

    Args:
        vectors, index: as in `word_similarity`.
        path: lines of four words, ":" in front of a section's name; None is questions-words.txt, which gensim ships.

    Example:
        >>> index = {"athens": 0, "greece": 1, "baghdad": 2, "iraq": 3}
        >>> word_analogies(torch.eye(4), index).known
        3

    Source: Mikolov et al. 2013 (arXiv:1301.3781); Levy and Goldberg 2014 for the name.
    """
    check.features(vectors=vectors)
    lower = {word.lower(): i for word, i in reversed(list(index.items()))}  # of two cases the first word
    source = corpus("questions-words.txt") if path is None else path
    rows = [line.lower().split() for line in _lines(source) if not line.startswith(":")]
    known = [[lower[word] for word in row] for row in rows if all(word in lower for word in row)]
    if not known:
        return WordScore(float("nan"), 0, len(rows))
    a, b, c, answer = torch.tensor(known, device=vectors.device).T
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    _, ids = topk_similarity(unit[b] - unit[a] + unit[c], unit, min(4, len(unit)), metric="dot")
    asked = (ids[..., None] == torch.stack((a, b, c), 1)[:, None]).any(-1)
    best = ids.gather(1, asked.int().argsort(dim=1, stable=True)[:, :1]).squeeze(1)
    return WordScore(float((best == answer).double().mean()), len(known), len(rows))


@torch.no_grad()
def context_accuracy(input_weight: Tensor, output_weight: Tensor, pairs: Tensor, *, seed: int = 0) -> float:
    """How often a word's score with its own context is above that with another pair's context: 0.5 is chance.

        mean over b of [<u_b, v_b> > <u_b, v_b'>] + [equal] / 2         b' another pair, chosen at random

    Both contexts come from the same pairs, so that a word's frequency alone gives no advantage.

    Args:
        input_weight, output_weight: (V, D) and (W, D).
        pairs: (P, 2) int64, rows of both, P > 1; best not those that were trained on.

    Example:
        >>> context_accuracy(torch.eye(3), torch.eye(3), torch.tensor([[0, 0], [1, 1], [2, 2]]))
        1.0
    """
    check.features(input_weight=input_weight, output_weight=output_weight)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) < 2:
        raise ValueError(f"pairs must have shape (P, 2) with P > 1, got {tuple(pairs.shape)}")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).to(pairs.device)
    other = torch.empty_like(order).scatter_(0, order, order.roll(1))  # along one cycle: none is its own
    u, v = input_weight[pairs[:, 0]].float(), output_weight[pairs[:, 1]].float()
    own, others = (u * v).sum(1), (u * v[other]).sum(1)
    return float(((own > others).double() + (own == others).double() / 2).mean())


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line
