# SPDX-License-Identifier: Apache-2.0
"""The presets, trained for a few seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sslkernels import data
from sslkernels.presets import PRESETS
from sslkernels.training import Training

# A transformer's step takes longer; iBOT, whose class tokens nothing keeps apart, needs more of them.
STEPS = {
    "digits": 150, "photographs": 60, "clips": 100, "words": 200, "conversation": 150, "news": 800, "ibot": 120,
    "beit": 350,
}  # fmt: skip


def steps_of(name: str) -> int:
    return STEPS.get(name) or STEPS[PRESETS[name].data]


@pytest.fixture
def training() -> Callable[..., Training]:
    """A preset of this name, untrained, with a schedule as long as the tests' training: `training(name, seed=0)`."""
    return lambda name, seed=0: Training(name, steps=steps_of(name), seed=seed)


class Trained(NamedTuple):
    run: Training
    untrained: dict[str, float]  # accuracies before
    losses: list[float]


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Trained]:
    """A method after all its steps: made once, for tests that only look at it."""

    @functools.cache
    def train(name: str) -> Trained:
        run = Training(name, steps=steps_of(name))
        return Trained(run, run.accuracy(), run.run())

    return train


@pytest.fixture
def views() -> tuple[Tensor, Tensor]:
    """Two views of 12 digits: small enough to write the formula out, not a multiple of anything."""
    generator = torch.Generator().manual_seed(3)
    return data.two_views(data.digits().train_images[:12], generator=generator, **data.DIGIT_VIEWS)


@pytest.fixture
def crops() -> list[Tensor]:
    """Two global and two local crops of 3 images, on grids of 4 x 5 and 2 x 3."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 3, 16, 20)] * 2 + [(3, 3, 8, 12)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
