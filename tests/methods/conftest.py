# SPDX-License-Identifier: Apache-2.0
"""One small setting for every method: the digits, a narrow CNN, and a training loop that can be stopped and resumed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sslkernels import data
from sslkernels.evaluation import extract_features, knn_accuracy
from sslkernels.methods import CLIP, MoCo, SigLIP, SimCLR
from sslkernels.methods._method import Method
from sslkernels.nn import ResidualCNN

Batch = tuple[Tensor, Tensor]
WORDS = len(data.CAPTION_VOCABULARY)


def cnn() -> ResidualCNN:
    return ResidualCNN(in_chans=1, channels=(16, 32))


def text_encoder() -> nn.Module:
    return nn.EmbeddingBag(WORDS, 32, padding_idx=0)


MAKERS: dict[str, Callable[[], Method]] = {
    "simclr": lambda: SimCLR(cnn(), dim=32),
    "moco": lambda: MoCo(cnn(), dim=32, queue_size=512, momentum=0.99),
    "clip": lambda: CLIP(cnn(), text_encoder(), dim=32),
    "siglip": lambda: SigLIP(cnn(), text_encoder(), dim=32),
}


class Training:
    """A method, its optimizer and its own source of batches, so that two of them can be compared step by step."""

    def __init__(self, name: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.name, self.method = name, MAKERS[name]()
        self.optimizer = torch.optim.AdamW(self.method.parameters(), lr=2e-3)
        self.generator = torch.Generator().manual_seed(seed)
        self.digits = data.digits()

    def batch(self, size: int = 128) -> Batch:
        chosen = torch.randperm(len(self.digits.train_images), generator=self.generator)[:size]
        images, labels = self.digits.train_images[chosen], self.digits.train_labels[chosen]
        if self.name in ("clip", "siglip"):
            view = data.augment(images, generator=self.generator, **data.DIGIT_VIEWS)
            return view, data.digit_captions(labels, generator=self.generator)
        return data.two_views(images, generator=self.generator, **data.DIGIT_VIEWS)

    def run(self, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            loss, metrics = self.method(self.batch())
            assert not any(value.requires_grad for value in metrics.values())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.method.after_step(step)
            losses.append(loss.item())
        return losses

    def knn(self) -> float:
        train, test = (extract_features(self.method, x) for x in (self.digits.train_images, self.digits.test_images))
        return knn_accuracy(train, self.digits.train_labels, test, self.digits.test_labels, k=5)

    def state(self) -> dict:
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


@pytest.fixture
def training() -> Callable[..., Training]:
    return Training


class Trained(NamedTuple):
    run: Training
    untrained: float  # kNN accuracy before
    losses: list[float]


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Trained]:
    """A method after 150 steps: made once, for tests that only look at it."""

    @functools.cache
    def train(name: str) -> Trained:
        run = Training(name)
        return Trained(run, run.knn(), run.run(150))

    return train


@pytest.fixture
def views() -> Batch:
    """Two views of 12 digits: small enough to write the formula out, not a multiple of anything."""
    generator = torch.Generator().manual_seed(3)
    return data.two_views(data.digits().train_images[:12], generator=generator, **data.DIGIT_VIEWS)
