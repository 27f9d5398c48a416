# SPDX-License-Identifier: Apache-2.0
"""word2vec's training in place: a text goes in, both tables have moved; and the table its negatives are drawn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.ops._registry import define
from sslkernels.reference import _skipgram as reference
from sslkernels.reference._skipgram import AliasTable

__all__ = ["AliasTable", "alias_table", "skipgram_update_"]

_update_ = define(
    "skipgram_update_(Tensor(a!) input_weight, Tensor(b!) output_weight, Tensor tokens, Tensor offsets, "
    "Tensor threshold, Tensor alias, Tensor? keep, Tensor seed, float lr, int window, int negatives, bool hogwild) "
    "-> ()",
    reference=reference.skipgram_update_,
    fake=None,
)


def alias_table(weights: Tensor) -> AliasTable:
    """A table that draws v with probability weights[v] / sum(weights) in constant time, by `AliasTable.sample`.

    A probability is off by less than 2^-31 for each column that leads to it. Built on the CPU in O(V), about a second
    for a million words; word2vec's weights are counts ** 0.75.

    Args:
        weights: (V,) floating, finite, not negative, their sum positive. A word of weight 0 is never drawn.

    Returns:
        AliasTable(threshold, alias), each (V,) int64 on the device of weights.

    Raises:
        ValueError, TypeError: another shape or dtype; no word, a negative or non-finite weight, or only zeros. The
            values are read, which synchronises a CUDA device.

    Example:
        >>> table = alias_table(torch.tensor([10.0, 3.0, 0.0]) ** 0.75)
        >>> int(table.sample(1000, seed=0).max())
        1

    Source: Walker 1977; Vose 1991, "A linear algorithm for generating random numbers with a given distribution".
    """
    check.floating("weights", weights)
    if weights.ndim != 1 or not 0 < weights.shape[0] < 2**31:
        raise ValueError(f"weights must have shape (V,) with 0 < V < 2^31, got {tuple(weights.shape)}")
    low, high = (float(x) for x in weights.detach().aminmax())
    if not 0 <= low <= high < float("inf") or high == 0:
        raise ValueError(f"weights must be finite, not negative and not all 0, got values in [{low}, {high}]")
    return reference.alias_table(weights)


@torch.no_grad()
def skipgram_update_(
    input_weight: Tensor,
    output_weight: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    lr: float,
    table: AliasTable,
    *,
    window: int = 5,
    negatives: int = 5,
    keep: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    hogwild: bool = False,
) -> None:
    """word2vec's skip-gram over a text, in place: pair after pair, each a step of SGD. No loss is computed.

        for each sentence, its words dropped with probability 1 - keep[word]
          for each centre word w of what is left, for each context word c within window - b of it (b uniform below
          window, drawn for w)
            u = input_weight[c];  step = 0
            for (row, label) in (w, 1), (n_1, 0), .., (n_K, 0)         n_k from table; n_k = w is skipped
              v = output_weight[row];  g = (label - sigmoid(<u, v>)) lr
              step += g v;  v += g u
            u += step

    All random numbers are Philox(seed, position in the text), so the pairs and negatives do not depend on threads.
    By default the result does not either: it is exactly the loop above, bit-identical at every thread count; one
    thread owns all rows and makes the steps, another draws the pairs of the next block.

    `hogwild=True` shares the sentences out among the threads, which write the same rows without locks, as word2vec and
    gensim do: NOT reproducible with more than one thread. It is for large vocabularies and many threads; where few
    words make most of the text, the threads wait for each other's rows, and it may be slower than the default.

    Args:
        input_weight, output_weight: (V, D), both float32 or both float64, contiguous, on the CPU, not overlapping. They
            may be parameters. Start from uniform(-0.5, 0.5) / D and zeros.
        tokens: (T,) int64 or int32 in [0, V).
        offsets: (S+1,) int64, rising from 0 to T: sentence s is tokens[offsets[s]:offsets[s+1]]. The original cuts
            sentences at 1,000 words.
        lr: a number, at least 0; the original falls linearly from 0.025 to 0.0001 of it in steps of 10,000 words.
        table: `alias_table(counts ** 0.75)` over the V words.
        window, negatives: at least 1 and 0, at most 2^15.
        keep: (V,) float32 probabilities, or None to keep all. The original's is (sqrt(f / t) + 1) t / f for a word with
            a share f of the text, t = 1e-3.
        generator, seed: at most one of the two. Another call needs another seed.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or layouts other than above; a token outside the tables, offsets
            that do not rise from 0 to T (compiled: RuntimeError). Nothing is written then.

    Example:
        >>> u, v = (torch.rand(10, 16) - 0.5) / 16, torch.zeros(10, 16)
        >>> tokens, table = torch.randint(10, (200,)), alias_table(torch.ones(10))
        >>> skipgram_update_(u, v, tokens, torch.tensor([0, 100, 200]), 0.025, table, seed=0)

    Source: tmikolov/word2vec `word2vec.c::TrainModelThread`, whose sigmoid is a table of 1,000 steps within [-6, 6].
    """
    _check_weights(input_weight, output_weight)
    _check_text(tokens, offsets, input_weight)
    vocabulary = input_weight.shape[0]
    if not isinstance(table, AliasTable):
        raise TypeError(f"table must be an AliasTable, as alias_table returns, got {type(table).__name__}")
    check.vector("table.threshold", table.threshold, vocabulary, input_weight, (torch.int64,))
    check.vector("table.alias", table.alias, vocabulary, input_weight, (torch.int64,))
    check.ids("table.alias", table.alias, vocabulary)
    if keep is not None:
        check.vector("keep", keep, vocabulary, input_weight, (torch.float32,))
    check.integer("window", window, 1, 2**15)
    check.integer("negatives", negatives, 0, 2**15)
    check.in_range("lr", lr, 0.0, float("inf"))
    chosen = seed_tensor(seed, generator, input_weight.device)
    _update_(
        input_weight, output_weight, tokens, offsets, *table, keep, chosen, float(lr), window, negatives, bool(hogwild)
    )
    if _is_real(input_weight):  # autograd notices a table that was saved for backward
        changed = (input_weight, output_weight)
        torch.autograd.graph.increment_version([x for x in changed if not x.is_inference()])


def _is_real(x: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor))


def _check_weights(input_weight: Any, output_weight: Any) -> None:
    check.features(input_weight=input_weight, output_weight=output_weight)
    for name, x in (("input_weight", input_weight), ("output_weight", output_weight)):
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != input_weight.dtype:
            raise TypeError(f"{name} must be float32 or float64, as the other table, got {x.dtype}")
        if x.shape != input_weight.shape:
            raise ValueError(f"{name} must have shape {tuple(input_weight.shape)}, got {tuple(x.shape)}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
        if x.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name} must be on the CPU, got {x.device}: pair after pair is no work for a GPU; use skipgram with "
                "an optimizer there"
            )
    if _is_real(input_weight):
        starts = sorted(x.data_ptr() for x in (input_weight, output_weight))
        if starts[0] + input_weight.numel() * input_weight.element_size() > starts[1]:
            raise ValueError("output_weight overlaps input_weight in memory")


def _check_text(tokens: Any, offsets: Any, input_weight: Tensor) -> None:
    check.tensor("tokens", tokens)
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have shape (T,), got {tuple(tokens.shape)}")
    check.vector("tokens", tokens, tokens.shape[0], input_weight, (torch.int64, torch.int32))
    check.ids("tokens", tokens, input_weight.shape[0])
    check.tensor("offsets", offsets)
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must have shape (S+1,), got {tuple(offsets.shape)}")
    check.vector("offsets", offsets, offsets.shape[0], input_weight, (torch.int64,))
    if check.readable(offsets):
        rises = bool((offsets.diff() >= 0).all())
        if not rises or int(offsets[0]) != 0 or int(offsets[-1]) != tokens.shape[0]:
            raise ValueError(f"offsets must rise from 0 to {tokens.shape[0]}, got {offsets.tolist()[:20]}")
