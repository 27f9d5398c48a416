# SPDX-License-Identifier: Apache-2.0
"""The mask cases: what a step's batch needs, drawn anew at every call. Forward only, and no memory to speak of."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import Case, Goal, Inputs, faster
from benchmarks.contenders import masks as contenders
from benchmarks.contenders import masks_sequence as sequence
from benchmarks.formulas import masks as formulas

VOCABULARY = 30522  # BERT's
T5_VOCABULARY = 32100


def settings(generator: torch.Generator, options: Inputs, **shape: int) -> Inputs:
    """The shape and the options are the arguments: there is nothing else to a mask."""
    return {**shape, **options}


def arguments(**options):
    return partial(settings, options=options)


def token_inputs(generator: torch.Generator, B: int, T: int) -> Inputs:
    """The first token and the last are special."""
    special = torch.zeros(B, T, dtype=torch.bool)
    special[:, [0, -1]] = True
    tokens = torch.randint(1000, VOCABULARY, (B, T), generator=generator)
    return {"tokens": tokens, "mask_token": 103, "vocabulary": VOCABULARY, "ratio": 0.15, "special": special}


def corruption_inputs(generator: torch.Generator, B: int, T: int) -> Inputs:
    tokens = torch.randint(2, T5_VOCABULARY - 100, (B, T), generator=generator)
    return {"tokens": tokens, "vocabulary": T5_VOCABULARY, "ratio": 0.15, "mean_span": 3.0, "eos": 1}


def block(grid: int) -> Case:
    return Case(
        f"block_mask-{grid}", "block_mask", {"B": 128, "grid": grid}, arguments(ratio=(0.1, 0.5), probability=0.5),
        contenders.BLOCK, eager=("dinov2",), holds=formulas.dinov2, goals=(faster("eager", 30.0),), memory=False,
        variant="DINOv2",
    )  # fmt: skip


def mask(name: str, shape: dict[str, int], inputs, contenders, eager: str, holds, *goals: Goal, variant="") -> Case:
    return Case(
        name, name, shape, inputs, contenders, eager=(eager,), holds=holds, goals=goals, variant=variant, memory=False
    )


CASES = (
    mask(
        "random_mask", {"B": 256, "L": 196}, arguments(), contenders.RANDOM, "mae", formulas.random,
        faster("mae", 3.0), variant="MAE",
    ),
    mask(
        "tube_mask", {"B": 128, "frames": 8, "grid": 14}, arguments(ratio=0.9), contenders.TUBE, "videomae",
        formulas.tube, variant="VideoMAE",
    ),
    block(16),
    block(37),
    mask(
        "multiblock_mask", {"B": 128, "grid": 16}, arguments(), contenders.MULTIBLOCK, "ijepa", formulas.multiblock,
        faster("eager", 40.0), variant="I-JEPA",
    ),
    mask(
        "inverse_block_mask", {"B": 128, "grid": 14}, arguments(ratio=0.8, block=3, adjust=0.07), contenders.INVERSE,
        "data2vec", formulas.inverse_block, variant="data2vec 2.0",
    ),
    mask(
        "span_mask", {"B": 128, "T": 500}, arguments(ratio=0.65, span=10), sequence.SPAN, "transformers",
        formulas.span, faster("eager", 20.0), variant="wav2vec 2.0",
    ),
    mask("token_mask", {"B": 128, "T": 512}, token_inputs, sequence.TOKEN, "transformers", formulas.token,
         variant="BERT"),
    mask("span_corruption", {"B": 128, "T": 568}, corruption_inputs, sequence.CORRUPTION, "transformers",
         formulas.corruption, variant="T5"),
)  # fmt: skip
