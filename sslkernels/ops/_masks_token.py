# SPDX-License-Identifier: Apache-2.0
"""Masks of text: BERT's tokens and whole words, T5's span corruption."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.ops._masks_span import check_lengths, check_rows
from sslkernels.ops._registry import define
from sslkernels.reference import _masks_sequence as reference

_tokens = define(
    "token_mask(Tensor seed, Tensor tokens, Tensor? special, Tensor? words, Tensor? lengths, SymInt mask_token,"
    " SymInt vocab_size, float ratio, SymInt max_predictions, float masked, float changed, SymInt ignore_index)"
    " -> (Tensor tokens, Tensor labels)",
    reference=reference.token_mask,
    fake=lambda seed, tokens, *rest: (tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)),
)


def _corruption_fake(seed, tokens, noise, spans, vocab_size, eos):
    batch, length = tokens.shape
    end = spans + (eos is not None)
    return tokens.new_empty(batch, length - noise + end), tokens.new_empty(batch, noise + end)


_corruption = define(
    "span_corruption(Tensor seed, Tensor tokens, SymInt noise, SymInt spans, SymInt vocab_size, SymInt? eos)"
    " -> (Tensor inputs, Tensor targets)",
    reference=reference.span_corruption,
    fake=_corruption_fake,
)


def _check_tokens(tokens: Any) -> None:
    check.tensor("tokens", tokens)
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be torch.int64, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be 2-D (batch, length), got shape {tuple(tokens.shape)}")


def token_mask(
    tokens: Tensor,
    mask_token: int,
    vocab_size: int,
    ratio: float = 0.15,
    *,
    special: Tensor | Sequence[int] | None = None,
    words: Tensor | None = None,
    lengths: Tensor | None = None,
    max_predictions: int | None = None,
    replace: Sequence[float] = (0.8, 0.1, 0.1),
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict and replace most of them: BERT's mask, of pieces or of whole words.

        count = min(max_predictions, max(1, round(ratio * n)))      n: the sample's `lengths`, or its candidates
        random candidates are chosen; of those 80% become mask_token, 10% any token, 10% stay

    Args:
        tokens: (B, L) int64, on any device.
        mask_token: id of [MASK].
        vocab_size: random replacements are uniform over all of it, as the original's.
        ratio: of the tokens, to predict; in (0, 1).
        special: what is never chosen: a (B, L) bool mask (padding included), or the ids of such tokens.
        words: (B, L) int64, the word that a token belongs to, for whole-word masks: neighbours with one number are one
            word, negative ones are never chosen. Words are taken in random order where they fit into what is left of
            the count; each piece draws its own replacement.
        lengths: (B,) int64 in [0, L]: what follows is never chosen. BERT's n counts [CLS] and [SEP], so give them.
        max_predictions: the most tokens to predict of a sample.
        replace: the parts replaced by mask_token, replaced by a random token, and kept; they add up to 1.
        ignore_index: label of tokens that are not predicted.
        generator, seed: as in `random_mask`, on the device of tokens.

    Returns:
        tokens, (B, L), and labels, (B, L) with the original token where it is to be predicted.

    Raises:
        ValueError, TypeError: tokens, special, words or lengths of another shape, dtype or device; numbers out of
            range; parts that do not add up to 1; lengths outside [0, L], as in `span_mask`.

    Example:
        >>> tokens = torch.randint(5, 1000, (8, 128))
        >>> inputs, labels = token_mask(tokens, mask_token=3, vocab_size=1000)
        >>> int((labels[0] != -100).sum())
        19

    Source: google-research/bert, create_pretraining_data.py::create_masked_lm_predictions.
    """
    _check_tokens(tokens)
    check.integer("vocab_size", vocab_size, 1, 2**31 - 1)
    check.integer("mask_token", mask_token, 0)
    check.ratio("ratio", ratio)
    shape, device = tuple(tokens.shape), tokens.device
    if special is not None:
        special = _special_mask(special, tokens)
    if words is not None:
        check_rows("words", words, shape, torch.int64, device)
    check_lengths(lengths, shape[0], shape[1], device)
    if max_predictions is not None:
        check.integer("max_predictions", max_predictions, 1)
    masked, changed = _replacement(replace)
    check.integer("ignore_index", ignore_index, -(2**63))
    most = shape[1] + 1 if max_predictions is None else max_predictions
    return _tokens(
        *(seed_tensor(seed, generator, device), tokens, special, words, lengths, mask_token, vocab_size, ratio),
        *(most, masked, changed, ignore_index),
    )


def _special_mask(special: Any, tokens: Tensor) -> Tensor:
    if not isinstance(special, Tensor):
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i, token in enumerate(special):
            check.integer(f"special[{i}]", token, 0)
            mask = mask | (tokens == token)
        return mask
    if special.dtype == torch.int64 and special.ndim == 1:
        check.same_device("special", special, "tokens", tokens)
        return torch.isin(tokens, special)
    check_rows("special", special, tuple(tokens.shape), torch.bool, tokens.device)
    return special


def _replacement(replace: Any) -> tuple[float, float]:
    """Upper ends of the first two parts."""
    if not isinstance(replace, Sequence) or len(replace) != 3:
        raise ValueError(f"replace must be three parts (mask token, random token, kept), got {replace!r}")
    for i, part in enumerate(replace):
        check.in_range(f"replace[{i}]", part, 0.0, math.nextafter(1.0, 2.0))
    if not math.isclose(sum(replace), 1.0, abs_tol=1e-6):
        raise ValueError(f"replace must add up to 1, got {tuple(replace)}")
    return float(replace[0]), 1.0 if replace[2] == 0 else float(replace[0] + replace[1])


def span_corruption(
    tokens: Tensor,
    vocab_size: int,
    ratio: float = 0.15,
    mean_span: float = 3.0,
    *,
    eos: int | None = 1,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace random spans by sentinels and ask for the spans: T5's pretraining.

        noise = min(max(round(ratio L), 1), L - 1), spans = max(1, round(noise / mean_span))
        the sequence is kept_0 noise_0 kept_1 noise_1 ...: all partitions into that many parts are equally likely
        inputs = kept_0 <s0> kept_1 <s1> ... eos, targets = <s0> noise_0 <s1> noise_1 ... eos, <si> = vocab_size - 1 - i

    Args:
        tokens: (B, L) int64, on any device, L >= 2; all of them below the sentinels.
        vocab_size: the sentinels count down from its last id.
        ratio: of the tokens, that are noise; in (0, 1).
        mean_span: mean length of a noise span, at least 1.
        eos: ends inputs and targets; None for no such token.
        generator, seed: as in `random_mask`, on the device of tokens.

    Returns:
        inputs, (B, L - noise + spans + 1), and targets, (B, noise + spans + 1): int64. 568 tokens give 512 and 114.

    Raises:
        ValueError, TypeError: tokens of another shape or dtype; more spans than kept tokens; a vocabulary without room
            for the sentinels, or tokens among them (on the CPU or under `check_values`).

    Example:
        >>> inputs, targets = span_corruption(torch.randint(5, 32000, (2, 568)), 32100)
        >>> inputs.shape, targets.shape
        (torch.Size([2, 512]), torch.Size([2, 114]))

    Source: google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py::random_spans_noise_mask.
    """
    _check_tokens(tokens)
    length = tokens.shape[1]
    check.integer("the length of tokens", length, 2)
    check.ratio("ratio", ratio)
    check.in_range("mean_span", mean_span, 1.0, math.inf)
    noise = min(max(round(length * ratio), 1), length - 1)
    spans = max(1, round(noise / mean_span))
    if spans > length - noise:
        raise ValueError(f"ratio and mean_span must leave a kept token for each of {spans} spans, got {length - noise}")
    check.integer("vocab_size", vocab_size, spans + 1, 2**31 - 1)
    if eos is not None:
        check.integer("eos", eos, 0)
    if tokens.numel() and check.readable(tokens) and int(tokens.amax()) >= vocab_size - spans:
        raise ValueError(
            f"tokens must be below the {spans} sentinels from {vocab_size - spans} on, got {tokens.amax()}"
        )
    return _corruption(seed_tensor(seed, generator, tokens.device), tokens, noise, spans, vocab_size, eos)
