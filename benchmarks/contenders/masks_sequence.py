# SPDX-License-Identifier: Apache-2.0
"""Contenders for masks of sequences: spans, tokens and T5's corruption, drawing as transformers draws."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Contender
from benchmarks.contenders.contrastive import OURS

Ids = tuple[Tensor, Tensor]


def transformers_spans(B: int, T: int, ratio: float, span: int) -> np.ndarray:
    """_compute_mask_indices without an attention mask."""
    epsilon = np.random.rand(1).item()  # noqa: NPY002

    def count(length: int) -> int:
        n = max(int(ratio * length / span + epsilon), 0)
        n = T // span if n * span > T else n
        return max(length - (span - 1), 0) if length - (span - 1) < n else n

    lengths = [T for _ in range(B)]
    mask = np.zeros((B, T), dtype=bool)
    most = count(T)
    if most == 0:
        return mask
    starts = []
    for length in lengths:
        n = count(length)
        drawn = np.random.choice(np.arange(length - (span - 1)), n, replace=False)  # noqa: NPY002
        filler = T - 1 if len(drawn) == 0 else drawn[0]
        starts.append(np.concatenate([drawn, np.ones(most - n, dtype=np.int32) * filler]))
    ids = np.broadcast_to(np.array(starts)[:, :, None], (B, most, span)).reshape(B, most * span)
    offsets = np.broadcast_to(np.arange(span)[None, None, :], (B, most, span)).reshape(B, most * span)
    ids = ids + offsets
    if ids.max() > T - 1:
        ids[ids > T - 1] = T - 1
    np.put_along_axis(mask, ids, 1, -1)
    return mask


def ours_span(B: int, T: int, ratio: float, span: int) -> Tensor:
    from sslkernels.ops import span_mask

    return span_mask(B, T, ratio, span, style="wav2vec2")


def transformers_tokens(tokens: Tensor, mask_token: int, vocabulary: int, ratio: float, special: Tensor) -> Ids:
    """torch_mask_tokens of the collator for language modelling; the copy is there because it works in place."""
    inputs, labels = tokens.clone(), tokens.clone()
    chances = torch.full(labels.shape, ratio)
    chances.masked_fill_(special, value=0.0)
    chosen = torch.bernoulli(chances).bool()
    labels[~chosen] = -100
    hidden = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & chosen
    inputs[hidden] = mask_token
    swapped = torch.bernoulli(torch.full(labels.shape, 0.1 / (1 - 0.8))).bool() & chosen & ~hidden
    words = torch.randint(vocabulary, labels.shape, dtype=torch.long)
    inputs[swapped] = words[swapped]
    return inputs, labels


def ours_tokens(tokens: Tensor, mask_token: int, vocabulary: int, ratio: float, special: Tensor) -> Ids:
    from sslkernels.ops import token_mask

    return token_mask(tokens, mask_token, vocabulary, ratio, special=special)


def segments(items: int, count: int) -> np.ndarray:
    """Lengths of `count` random segments that are not empty."""
    starts = np.arange(items - 1) < (count - 1)
    np.random.shuffle(starts)  # noqa: NPY002
    return np.bincount(np.cumsum(np.pad(starts, [[1, 0]])))


def noise(length: int, ratio: float, mean_span: float) -> np.ndarray:
    tokens = min(max(int(np.round(length * ratio)), 1), length - 1)
    spans = max(int(np.round(tokens / mean_span)), 1)
    hidden, shown = segments(tokens, spans), segments(length - tokens, spans)
    starts = np.cumsum(np.reshape(np.stack([shown, hidden], axis=1), [spans * 2]))[:-1]
    start = np.zeros((length,), dtype=np.int8)
    start[starts] = True
    return np.equal(np.cumsum(start) % 2, 1)


def sentinels(mask: np.ndarray, vocabulary: int) -> np.ndarray:
    """Counting down at the first token of a run, -1 at the others, 0 outside."""
    first = mask - np.roll(mask, 1, axis=-1) * mask
    first[:, 0] = mask[:, 0]
    ids = np.where(first != 0, np.cumsum(first, axis=-1), first)
    ids = np.where(ids != 0, vocabulary - ids, 0)
    ids -= mask - first
    return ids


def fused(tokens: np.ndarray, ids: np.ndarray, eos: int) -> np.ndarray:
    full = np.where(ids != 0, ids, tokens)
    kept = full[full > 0].reshape((len(tokens), -1))
    return np.concatenate([kept, np.full((len(tokens), 1), eos, dtype=np.int32)], axis=-1)


def flax_corruption(
    tokens: np.ndarray, vocabulary: int, ratio: float, mean_span: float, eos: int
) -> tuple[np.ndarray, np.ndarray]:
    """Its segments are summed by jax; here by NumPy, which takes less time for a row of this length."""
    mask = np.asarray([noise(tokens.shape[1], ratio, mean_span) for _ in range(len(tokens))])
    inputs, targets = (sentinels(m.astype(np.int8), vocabulary) for m in (mask, ~mask))
    return fused(tokens, inputs, eos), fused(tokens, targets, eos)


def ours_corruption(tokens: Tensor, vocabulary: int, ratio: float, mean_span: float, eos: int) -> Ids:
    from sslkernels.ops import span_corruption

    return span_corruption(tokens, vocabulary, ratio, mean_span, eos=eos)


WAV2VEC2 = "transformers 5.23, models/wav2vec2/modeling_wav2vec2.py, _compute_mask_indices"
SPAN = (
    Contender("sslkernels", ours_span, OURS),
    Contender("transformers", transformers_spans, WAV2VEC2, result=torch.from_numpy),
)
TOKEN = (
    Contender("sslkernels", ours_tokens, OURS),
    Contender(
        "transformers", transformers_tokens, "transformers 5.23, data/data_collator.py, DataCollatorForLanguageModeling"
    ),
)
CORRUPTION = (
    Contender("sslkernels", ours_corruption, OURS),
    Contender(
        "transformers", flax_corruption, "transformers, examples/flax/language-modeling/run_t5_mlm_flax.py",
        prepare=lambda inputs: {**inputs, "tokens": inputs["tokens"].numpy()},
        result=lambda result: tuple(torch.from_numpy(x) for x in result),
    ),
)  # fmt: skip
