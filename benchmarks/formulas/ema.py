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
    total = variance = 0.0
    for i, (got, t, s) in enumerate(zip(result, targets, sources, strict=True)):
        if got.dtype != torch.bfloat16 or got.shape != t.shape:
            return f"targets[{i}] is {got.dtype} {tuple(got.shape)}, expected bfloat16 {tuple(t.shape)}"
        t, s = t.double(), s.double()
        (exact,) = average([t], [s], momentum)
        place = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)  # bfloat16 keeps 8 bits
        error = got - exact
        # The float32 sum may be off by a few of its own roundings, and is rounded from there.
        slack = t.abs_().add_(s.abs_()).mul_(2.0**-22)
        if not (error.abs() <= place + slack).all():
            return f"targets[{i}] is not a neighbour of the average"
        total += error.sum().item()
        variance += place.square_().sum().item() / 4  # f (1 - f) of a place squared, at most
    if not abs(total) <= 6 * math.sqrt(variance):
        return f"the errors add up to {total:.3g}, expected 0 +- {6 * math.sqrt(variance):.2g}"
    return None
