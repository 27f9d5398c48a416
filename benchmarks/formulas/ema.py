# SPDX-License-Identifier: Apache-2.0
"""The moving average, and what rounding at random must look like."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def average(targets: list[Tensor], sources: list[Tensor], momentum: float) -> list[Tensor]:
    """m t + (1 - m) s, pair by pair."""
    return [momentum * t + (1 - momentum) * s for t, s in zip(targets, sources, strict=True)]


def rounded_at_random(
    result: list[Tensor], targets: list[Tensor], sources: list[Tensor], momentum: float
) -> str | None:
    """bfloat16 results: each a neighbour of the exact average, and right on average.

    Rounding to nearest fails the second: the sources lie above the targets, and nothing would move.
    """
    count, total = 0, 0.0
    for i, (got, t, s) in enumerate(zip(result, targets, sources, strict=True)):
        if got.dtype != torch.bfloat16 or got.shape != t.shape:
            return f"targets[{i}] is {got.dtype} {tuple(got.shape)}, expected bfloat16 {tuple(t.shape)}"
        (exact,) = average([t.double()], [s.double()], momentum)
        place = torch.exp2(exact.abs().log2().floor() - 7)  # bfloat16 keeps 8 bits
        error = (got.double() - exact) / place
        # A float32 sum may be off by 2^-16 of a place, and then round from there.
        if not (error.abs() <= 1 + 2**-10).all():
            return f"targets[{i}] is off by {error.abs().max():.2f} units in the last place, expected at most 1"
        total += error.sum().item()
        count += error.numel()
    mean, deviation = total / count, 0.5 / math.sqrt(count)  # an error has a variance of f (1 - f) <= 1/4
    if not abs(mean) <= 6 * deviation + 2**-10:
        return f"the mean error is {mean:.4f} units in the last place, expected 0 +- {6 * deviation:.4f}"
    return None
