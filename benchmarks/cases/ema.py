# SPDX-License-Identifier: Apache-2.0
"""The moving-average cases: the parameters of a ViT-B/16, in place."""

from __future__ import annotations

from math import prod

import torch

from benchmarks.case import Case, Inputs, faster
from benchmarks.contenders import ema as contenders
from benchmarks.floors import Copy
from benchmarks.formulas import ema as formulas

MOMENTUM = 0.996


def vit(D: int, blocks: int) -> list[tuple[int, ...]]:
    """Class token, positions, patch embedding, blocks, norm and head: 152 tensors, 86.6M values for ViT-B/16."""
    block = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,)]
    return [(1, 1, D), (1, 197, D), (D, 3, 16, 16), (D,), *block * blocks, (D,), (D,), (1000, D), (1000,)]


def inputs(generator: torch.Generator, D: int, blocks: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """The sources lie above the targets, so that an average that stalls is seen."""
    targets = [torch.randn(shape, generator=generator).to(dtype) for shape in vit(D, blocks)]
    sources = [t + torch.rand(t.shape, generator=generator).to(dtype) for t in targets]
    return {"targets": targets, "sources": sources, "momentum": MOMENTUM}


def bfloat16_inputs(generator: torch.Generator, D: int, blocks: int) -> Inputs:
    return inputs(generator, D, blocks, torch.bfloat16)


def moved(size: int):
    def parts(D: int, blocks: int) -> dict[str, int]:
        values = size * sum(prod(shape) for shape in vit(D, blocks))
        return {"read targets": values, "read sources": values, "write targets": values}

    return parts


VIT_B = {"D": 768, "blocks": 12}
CASES = (
    Case(
        "ema_update-float32", "ema_update_", VIT_B, inputs, contenders.FLOAT32,
        eager=("lightly", "ijepa", "moco"), formula=formulas.average, floor=Copy(moved(4)), variant="float32",
        goals=(faster("lean", 0.97), faster("lightly", 1.6)), changes=("targets",), memory=False,
    ),
    Case(
        "ema_update-bfloat16", "ema_update_", VIT_B, bfloat16_inputs, contenders.STOCHASTIC,
        eager=("timm",), holds=formulas.rounded_at_random, floor=Copy(moved(2)),
        variant="bfloat16, stochastic rounding", goals=(faster("timm", 3.0),), changes=("targets",),
    ),
)  # fmt: skip
