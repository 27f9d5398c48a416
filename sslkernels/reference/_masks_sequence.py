# SPDX-License-Identifier: Apache-2.0
"""The masks of sequences in plain PyTorch: spans of frames, spans of words, tokens, and T5's corruption."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkernels.reference import _philox as philox
from sslkernels.reference.masks import CORRUPTION, SPAN, TOKEN, fraction, words


def _rank(keys: Tensor, *outside: Tensor) -> Tensor:
    """Rank of each key in its row, the earlier of two equal ones first, after those that are inside more often."""
    for x in outside:
        keys = keys + x.to(torch.int64) * 2**32
    return keys.argsort(dim=1, stable=True).argsort(dim=1)


def _sizes(seed: Tensor, batch: int, length: int, lengths: Tensor | None) -> Tensor:
    """How many leading tokens of each sample count, (B, 1)."""
    if lengths is None:
        return torch.full((batch, 1), length, device=seed.device)
    return lengths.clamp(0, length)[:, None]


def span_mask(
    seed: Tensor, batch: int, length: int, lengths: Tensor | None, ratio: float, span: int, min_spans: int
) -> Tensor:
    """Spans of fixed length from distinct random starts; they may overlap: (B, L) bool.

    Floyd's way to choose `count` of `starts`: step s takes a place up to starts - count + s, or that if it is taken.
    """
    index, size = torch.arange(length, device=seed.device), _sizes(seed, batch, length, lengths)
    starts = (size - span + 1).clamp(min=0)
    chance = fraction(words(seed, SPAN, batch, 1, index[:1]))
    count = (ratio * size.to(torch.float64) / span + chance).floor().to(torch.int64).clamp(min=min_spans)
    count = torch.minimum(count, starts)
    most = min(length - span + 1, max(int(ratio * length / span + 1), min_spans))
    begins = torch.zeros(batch, length, dtype=torch.bool, device=seed.device)
    draws = words(seed, SPAN, batch, 0, torch.arange(most, device=seed.device))
    for step, word in enumerate(draws.split(1, dim=1)):
        last = (starts - count + step).clamp(max=length - 1)
        place = philox.below(word, last + 1)
        place = torch.where(begins.gather(1, place), last, place)
        begins = begins.scatter(1, place, begins.gather(1, place) | (step < count))
    opened = begins.cumsum(1)
    closed = torch.nn.functional.pad(opened, (span, 0))[:, :length]
    return opened > closed


def centred_span_mask(
    seed: Tensor, batch: int, length: int, lengths: Tensor | None, ratio: float, density: float, span: int
) -> Tensor:
    """Spans around random centres, then frames dropped or added until int(ratio * length) are masked: (B, L) bool."""
    index, size = torch.arange(length, device=seed.device), _sizes(seed, batch, length, lengths)
    centres = (density * size.to(torch.float64)).floor().to(torch.int64)
    draw = torch.arange(int(density * length), device=seed.device)
    first = philox.below(words(seed, SPAN, batch, 1, draw), size) - span // 2  # (B, n)
    first = torch.where(draw < centres, first, length)[:, :, None]
    covered = ((index >= first) & (index < first + span)).any(1)
    count = (ratio * size.to(torch.float64)).floor().to(torch.int64)
    return _rank(words(seed, SPAN, batch, 0, index), ~covered, index >= size, index >= size) < count


def word_span_mask(
    seed: Tensor,
    batch: int,
    length: int,
    lengths: Tensor | None,
    word: Tensor | None,
    ratio: float,
    thresholds: list[int],
) -> Tensor:
    """Spans of whole words from random unmasked anchors until ceil(ratio * tokens) are masked: (B, L) bool.

    A span has one word, and one more for each threshold that a random word of 32 bits reaches.
    """
    index = torch.arange(length, device=seed.device)
    valid = index < _sizes(seed, batch, length, lengths)
    begins = torch.ones_like(valid)
    if word is not None:
        valid = valid & (word >= 0)
        begins[:, 1:] = word[:, 1:] != word[:, :-1]
    # a token that can't be masked ends every span, as if it were that many words
    ordinal = torch.where(valid, begins.to(torch.int64), len(thresholds) + 1).cumsum(1)
    budget = (ratio * valid.sum(1, dtype=torch.float64)).ceil().to(torch.int64)[:, None]
    mask = torch.zeros_like(valid)
    for t in range(math.ceil(ratio * length)):
        remaining = budget - mask.sum(1, keepdim=True)
        if seed.device.type == "cpu" and not (remaining > 0).any():
            break
        draw = words(seed, SPAN, batch, 2, 2 * t + torch.arange(2, device=seed.device))
        free = valid & ~mask
        order = free.cumsum(1)
        anchor = (
            (free & (order == philox.below(draw[:, 1:], order[:, -1:]) + 1)).to(torch.int64).argmax(1, keepdim=True)
        )
        more = sum((draw[:, :1] >= x).to(torch.int64) for x in thresholds)
        past = ordinal - ordinal.gather(1, anchor)
        inside = free & (past >= 0) & (past <= more)
        mask = mask | (inside & (inside.cumsum(1) <= remaining))
    return mask


def _whole_words(key: Tensor, candidate: Tensor, word: Tensor, budget: Tensor) -> Tensor:
    """Words in random order, each taken if all of it fits into what is left of the budget: (B, L) bool."""
    index = torch.arange(key.shape[1], device=key.device)
    starts = candidate.clone()
    starts[:, 1:] &= (word[:, 1:] != word[:, :-1]) | ~candidate[:, :-1]
    start = torch.where(starts, index, 0).cummax(1).values  # of the word that a token belongs to
    size = torch.zeros_like(key).scatter_add(1, start, candidate.to(torch.int64))
    order = (key + (~starts).to(torch.int64) * 2**32).argsort(dim=1, stable=True)
    taken, count = torch.zeros_like(candidate), torch.zeros_like(budget)
    for position in order.split(1, dim=1):
        if key.device.type == "cpu" and not (count < budget).any():
            break
        pieces = size.gather(1, position) * starts.gather(1, position)
        fits = (pieces > 0) & (count + pieces <= budget)
        taken = taken.scatter(1, position, fits)
        count = count + pieces * fits
    return candidate & taken.gather(1, start)


def token_mask(
    seed: Tensor,
    tokens: Tensor,
    special: Tensor | None,
    word: Tensor | None,
    lengths: Tensor | None,
    mask_token: int,
    vocab_size: int,
    ratio: float,
    max_predictions: int,
    masked: float,
    changed: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Tokens to predict, replaced by the mask token (u < masked), by a random one (u < changed), or kept."""
    batch, length = tokens.shape
    index, size = torch.arange(length, device=seed.device), _sizes(seed, batch, length, lengths)
    candidate = index < size
    if special is not None:
        candidate = candidate & ~special
    if word is not None:
        candidate = candidate & (word >= 0)
    tokens_counted = candidate.sum(1, keepdim=True) if lengths is None else size
    budget = (tokens_counted.to(torch.float64) * ratio).round().to(torch.int64).clamp(1, max_predictions)
    key = words(seed, TOKEN, batch, 0, index)
    if word is None:
        chosen = candidate & (_rank(key, ~candidate) < budget)
    else:
        chosen = _whole_words(key, candidate, word, budget)
    draw = 2 * (chosen.cumsum(1) - 1).clamp(min=0)  # two words for each of the chosen
    u = fraction(words(seed, TOKEN, batch, 1, draw))
    other = philox.below(words(seed, TOKEN, batch, 1, draw + 1), vocab_size)
    replaced = torch.where(u < masked, mask_token, torch.where(u < changed, other, tokens))
    return torch.where(chosen, replaced, tokens), torch.where(chosen, tokens, ignore_index)


def span_corruption(
    seed: Tensor, tokens: Tensor, noise: int, spans: int, vocab_size: int, eos: int | None
) -> tuple[Tensor, Tensor]:
    """Cut the sequence into kept and noise segments in turn, `spans` of each; the noise goes to the targets."""
    batch, length = tokens.shape
    ids = torch.arange(spans, device=seed.device).expand(batch, spans).contiguous()

    def segments(region: int, items: int) -> Tensor:
        """The segment that each item falls into, (B, items)."""
        key = words(seed, CORRUPTION, batch, region, torch.arange(items - 1, device=seed.device))
        return torch.nn.functional.pad((_rank(key) < spans - 1).to(torch.int64), (1, 0)).cumsum(1)

    noisy, kept = segments(0, noise), segments(1, length - noise)
    noise_before = torch.searchsorted(noisy, ids)  # (B, spans): noise in earlier segments
    kept_until = torch.searchsorted(kept, ids, right=True)
    item = torch.arange(length, device=seed.device)
    kept_tokens = tokens.gather(1, item[: length - noise] + noise_before.gather(1, kept))
    noise_tokens = tokens.gather(1, item[:noise] + kept_until.gather(1, noisy))
    end = () if eos is None else (tokens.new_full((batch, 1), eos),)

    def merged(values: Tensor, segment: Tensor, ahead: int, places: Tensor) -> Tensor:
        """The values, each behind the sentinels of `ahead` plus as many segments as its own, with the sentinels."""
        out = tokens.new_empty(batch, values.shape[1] + spans)
        out = out.scatter(1, item[: values.shape[1]] + segment + ahead, values)
        return torch.cat((out.scatter(1, places + ids, vocab_size - 1 - ids), *end), 1)

    return merged(kept_tokens, kept, 0, kept_until), merged(noise_tokens, noisy, 1, noise_before)
