# SPDX-License-Identifier: Apache-2.0
"""The regression cases: a JEPA's loss and data2vec's targets, at ViT-B's width."""

from __future__ import annotations

import torch

from benchmarks.case import Case, Inputs, faster
from benchmarks.contenders import regression as contenders
from benchmarks.floors import Copy
from benchmarks.formulas import regression as formulas

BLOCKS, TOKENS = 4, 44  # of I-JEPA: target blocks, and the mean number of tokens in one on a 16 x 16 grid
LAYERS = 10  # of 12, as data2vec 2.0 for images
FLOAT = 4  # bytes


def jepa_inputs(generator: torch.Generator, B: int, grid: int, D: int) -> Inputs:
    """Each block is a random rectangle of 4 x 11 tokens."""
    top = torch.randint(grid - 3, (B, BLOCKS, 1, 1), generator=generator)
    left = torch.randint(grid - 10, (B, BLOCKS, 1, 1), generator=generator)
    ids = ((top + torch.arange(4)[:, None]) * grid + left + torch.arange(11)).flatten(2)
    return {
        "pred": torch.randn(B, BLOCKS, TOKENS, D, generator=generator).requires_grad_(),
        "target": 3 * torch.randn(B, grid**2, D, generator=generator) + 1,
        "ids": ids,
    }


def jepa_bytes(B: int, grid: int, D: int) -> dict[str, int]:
    rows = FLOAT * B * BLOCKS * TOKENS * D
    return {"read pred": rows, "read targets": rows, "write gradient": rows}


def layers_inputs(generator: torch.Generator, B: int, L: int, D: int) -> Inputs:
    return {"layers": [2 * torch.randn(B, L, D, generator=generator) + 1 for _ in range(LAYERS)]}


def layers_bytes(B: int, L: int, D: int) -> dict[str, int]:
    """A layer is read for its statistics and again to be standardised: it does not stay in the cache in between."""
    layer = FLOAT * B * L * D
    return {"read layers twice": 2 * LAYERS * layer, "write targets": layer}


CASES = (
    Case(
        "masked_regression", "masked_regression", {"B": 64, "grid": 16, "D": 768}, jepa_inputs, contenders.JEPA,
        eager=("ijepa",), fresh=True, formula=formulas.jepa, floor=Copy(jepa_bytes), goals=(faster("eager", 3.0),),
        variant="I-JEPA",
    ),
    Case(
        "average_layers", "average_layers", {"B": 16, "L": 196, "D": 768}, layers_inputs, contenders.TARGETS,
        eager=("data2vec",), fresh=True, formula=formulas.layer_targets, floor=Copy(layers_bytes), variant="10 layers",
    ),
)  # fmt: skip
