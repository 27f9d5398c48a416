# SPDX-License-Identifier: Apache-2.0
"""word2vec: a word's row tells which words stand around it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.methods._method import Method
from sslkernels.ops import AliasTable, alias_table, skipgram, skipgram_update_, topk_similarity

LONGEST = 1000  # words of a sentence; a longer one is cut, as in the original
CHUNK = 10_000  # words between two learning rates


class Word2Vec(Method):
    """Mikolov et al. 2013, skip-gram with negative sampling. batch = (inputs, outputs), word ids (B,) each.

        loss = mean_b(softplus(-<u, v>) + sum_k softplus(<u, n_k>))      u = input_weight[inputs_b],
        n_1 .. n_K drawn by counts ** 0.75, those equal to outputs_b skipped      v, n = rows of output_weight

    The original's input is a context word, its output the centre word. `forward` is for an optimizer; `fit` trains on a
    whole text in place, the original's way and at its speed: subsampling, random windows, plain SGD pair by pair.
    Features are the rows of `input_weight`.

    Args:
        counts: (V,), how often each word occurs in the text.
        dim, window, negatives, sample: the original's; a word with a share f of the text is kept with probability
            (sqrt(f / sample) + 1) sample / f, and always with sample=0.
        sparse: gradients as COO tensors, for `torch.optim.SparseAdam` and large vocabularies.

    Source: tmikolov/word2vec `word2vec.c`, with `-cbow 0`.

    Example:
        >>> method = Word2Vec(torch.tensor([5, 3, 2]), dim=8)
        >>> method.fit([[0, 1, 2, 0, 1], [2, 1, 0]], epochs=2)
        >>> loss, metrics = method((torch.tensor([0, 1]), torch.tensor([1, 2])))
    """

    threshold: Tensor
    alias: Tensor
    keep: Tensor

    def __init__(
        self,
        counts: Tensor,
        *,
        dim: int = 100,
        window: int = 5,
        negatives: int = 5,
        sample: float = 1e-3,
        sparse: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        check.tensor("counts", counts)
        check.integer("dim", dim, 1)
        check.integer("window", window, 1)
        check.integer("negatives", negatives, 0)
        check.in_range("sample", sample, 0.0, 1.0)
        self.window, self.negatives, self.sparse = window, negatives, sparse
        self.input_weight = nn.Parameter((torch.rand(len(counts), dim) - 0.5) / dim)
        self.output_weight = nn.Parameter(torch.zeros(len(counts), dim))
        counts = counts.double()
        # state, not made again on loading: draws go on as they were
        for name, x in alias_table(counts**0.75)._asdict().items():
            self.register_buffer(name, x)
        self.register_buffer("keep", keep_probability(counts, sample))

    @property
    def dim(self) -> int:
        return self.input_weight.shape[1]

    @property
    def table(self) -> AliasTable:
        return AliasTable(self.threshold, self.alias)

    def forward(
        self, batch: tuple[Tensor, Tensor], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, outputs = batch
        draws = self.draw(outputs, lambda rows: self.table.sample(rows, self.negatives, generator=generator))
        loss = skipgram(
            self.input_weight, self.output_weight, inputs, outputs, draws, reduction="mean", sparse=self.sparse
        )
        loss = self.whole(outputs).weigh(loss)
        return loss, {"loss": loss.detach()}

    def fit(
        self,
        sentences: Iterable[Iterable[int] | Tensor],
        *,
        epochs: int = 5,
        lr: float = 0.025,
        min_lr_ratio: float = 1e-4,
        hogwild: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Train on sentences of word ids, `epochs` times over; lr falls linearly to `min_lr_ratio` of it.

        Bit for bit the same at every thread count, unless `hogwild`: see `skipgram_update_`. On the CPU.
        """
        check.integer("epochs", epochs, 1)
        tokens, offsets = flatten(sentences)
        starts = offsets.tolist()
        total, done = epochs * len(tokens) + 1, 0
        seed = int(seed_tensor(None, generator))
        for _ in range(epochs):
            first = 0
            while first + 1 < len(starts):
                last = max(first + 1, bisect_right(starts, starts[first] + CHUNK) - 1)
                text = tokens[starts[first] : starts[last]]
                now = lr * max(1 - done / total, min_lr_ratio)
                seed = (seed + 1) % 2**63
                skipgram_update_(
                    self.input_weight,
                    self.output_weight,
                    text,
                    offsets[first : last + 1] - starts[first],
                    now,
                    self.table,
                    window=self.window,
                    negatives=self.negatives,
                    keep=self.keep.float(),  # also of a method that was cast as a whole
                    seed=seed,
                    hogwild=hogwild,
                )
                first, done = last, done + len(text)

    def encode(self, x: Tensor) -> Tensor:
        """The vectors (..., dim) of word ids."""
        return self.input_weight[x]

    def most_similar(self, words: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Cosines and ids (B, k) of the words most similar to each of `words` (B,), itself left out."""
        check.integer("k", k, 1, len(self.input_weight) - 1)
        weight = self.input_weight.detach()
        values, ids = topk_similarity(weight[words], weight, k + 1, metric="cosine")
        others = (ids == words[:, None]).int().argsort(dim=1, stable=True)[:, :k]  # a word need not be its own first
        return values.gather(1, others), ids.gather(1, others)


def keep_probability(counts: Tensor, sample: float = 1e-3) -> Tensor:
    """(V,) float32: how likely the original keeps a word that occurs `counts` times."""
    if sample == 0:
        return torch.ones(len(counts))
    share = counts.double() / counts.sum() / sample
    return torch.where(share > 0, ((share.sqrt() + 1) / share).clamp(max=1.0), 1.0).float()


def flatten(sentences: Iterable[Iterable[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """The ids of all sentences (T,), and where each begins and the last ends (S+1,); none is longer than `LONGEST`."""
    parts = [torch.as_tensor(s if isinstance(s, Tensor) else list(s), dtype=torch.int64) for s in sentences]
    parts = [piece for part in parts if len(part) for piece in part.split(LONGEST)]
    if not parts:
        raise ValueError("sentences must hold at least one word")
    return torch.cat(parts), torch.tensor([0, *map(len, parts)]).cumsum(0)
