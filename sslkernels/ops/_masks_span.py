# SPDX-License-Identifier: Apache-2.0
"""Masks of sequences: spans of frames and of words."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.ops._masks_grid import MOST_PATCHES, Device
from sslkernels.ops._registry import define
from sslkernels.reference import _masks_sequence as reference


def _mask_fake(seed, batch, length, *rest):
    return seed.new_empty(batch, length, dtype=torch.bool)


_spans = define(
    "span_mask(Tensor seed, SymInt batch, SymInt length, Tensor? lengths, float ratio, SymInt span, SymInt min_spans)"
    " -> Tensor",
    reference=reference.span_mask,
    fake=_mask_fake,
)
_centred = define(
    "centred_span_mask(Tensor seed, SymInt batch, SymInt length, Tensor? lengths, float ratio, float density,"
    " SymInt span) -> Tensor",
    reference=reference.centred_span_mask,
    fake=_mask_fake,
)
_word_spans = define(
    "word_span_mask(Tensor seed, SymInt batch, SymInt length, Tensor? lengths, Tensor? words, float ratio,"
    " int[] thresholds) -> Tensor",
    reference=reference.word_span_mask,
    fake=_mask_fake,
)


def check_rows(name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check.tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device.type != device.type:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def check_lengths(lengths: Any, batch: int, length: int, device: torch.device) -> None:
    if lengths is None:
        return
    check_rows("lengths", lengths, (batch,), torch.int64, device)
    if batch and check.readable(lengths):
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > length:
            raise ValueError(f"lengths must be in [0, {length}], got {low if low < 0 else high}")


def _span_thresholds(geometric: float, longest: int) -> list[int]:
    """Word w of 32 bits makes a span of 1 + (how many of these it reaches) words, truncated and renormalised."""
    cumulative = itertools.accumulate(geometric * (1 - geometric) ** i for i in range(longest))
    *inner, total = cumulative
    return [int(x / total * 2**32) for x in inner]


def span_mask(
    batch_size: int,
    length: int,
    ratio: float = 0.65,
    span: int = 10,
    *,
    lengths: Tensor | None = None,
    style: str = "wav2vec2",
    min_spans: int = 0,
    adjust: float = 0.05,
    words: Tensor | None = None,
    geometric: float = 0.2,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Hide spans of a sequence: the masks of wav2vec 2.0 and HuBERT, data2vec 2.0 and SpanBERT.

    The styles, with n the tokens of a sample (its entry of `lengths`, or L):

        "wav2vec2"  max(int(ratio n / span + U(0, 1)), min_spans) spans from distinct starts 0 to n - span, which may
                    overlap: of 500 frames, ratio 0.65 hides about 49% and HuBERT's 0.8 about 57%.
        "data2vec"  int(n (ratio + adjust) / span) spans around random centres, repeats allowed, cut at the ends; then
                    random frames are dropped or added until exactly int(ratio n) are hidden.
        "spanbert"  until exactly ceil(ratio n) tokens are hidden: an unhidden token at random and the words from its
                    own on, as many as a geometric draw of 1 to `span` says (mean 3.80 at 0.2).

    Args:
        batch_size: B. May be 0.
        length: L, frames or tokens.
        ratio: in (0, 1); exact for data2vec and spanbert.
        span: length of a span in frames, or in spanbert of the longest in words.
        lengths: (B,) int64 in [0, L]: what follows is padding and never hidden. Shorter than a span: nothing is hidden
            in the style wav2vec2.
        min_spans: of wav2vec2, at least so many.
        adjust: of data2vec, as in `inverse_block_mask`.
        words: of spanbert, (B, L) int64, the word that a token belongs to: neighbours with one number are one word, and
            a token with a negative one is never hidden and ends a span. Every token is a word if not given.
        geometric: of spanbert, the chance that a span ends with a word.
        device, generator, seed: as in `random_mask`.

    Returns:
        (B, L) bool, True where hidden.

    Raises:
        ValueError, TypeError: numbers out of range; lengths or words of another shape, dtype or device; lengths outside
            [0, L] on the CPU or under `check_values` (elsewhere they are clamped).

    Example:
        >>> mask = span_mask(8, 500)
        >>> mask.shape
        torch.Size([8, 500])

    Source: facebookresearch/fairseq, fairseq/data/data_utils.py::{compute_mask_indices, compute_block_mask_1d} (whose
        starts leave out the last one, and whose batch shares the U(0, 1)); facebookresearch/SpanBERT,
        pretraining/fairseq/data/masking.py::PairWithSpanMaskingScheme.
    """
    check.integer("batch_size", batch_size, 0)
    check.integer("length", length, 1, MOST_PATCHES)
    check.ratio("ratio", ratio)
    check.integer("span", span, 1, None if style == "spanbert" else length)
    check.choice("style", style, ("wav2vec2", "data2vec", "spanbert"))
    device = torch.device("cpu" if device is None else device)
    check_lengths(lengths, batch_size, length, device)
    if words is not None and style != "spanbert":
        raise ValueError(f"words must come with style='spanbert', got {style!r}")
    if style == "wav2vec2":
        check.integer("min_spans", min_spans, 0)
        return _spans(seed_tensor(seed, generator, device), batch_size, length, lengths, ratio, span, min_spans)
    if style == "data2vec":
        check.in_range("adjust", adjust, 0.0, 1.0)
        density = (ratio + adjust) / span
        return _centred(seed_tensor(seed, generator, device), batch_size, length, lengths, ratio, density, span)
    if words is not None:
        check_rows("words", words, (batch_size, length), torch.int64, device)
    check.ratio("geometric", geometric)
    thresholds = _span_thresholds(geometric, span)
    return _word_spans(seed_tensor(seed, generator, device), batch_size, length, lengths, words, ratio, thresholds)
