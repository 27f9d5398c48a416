# SPDX-License-Identifier: Apache-2.0
"""A training loop for the presets: real data, AdamW under a cosine schedule, and what the features are worth."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

from sslkernels import data
from sslkernels.evaluation import extract_features, knn_accuracy
from sslkernels.presets import PRESETS

__all__ = ["Training", "dataset", "steps_in"]

WARMUP = 0.1  # of all steps
NEIGHBORS = 5


@functools.cache
def dataset(name: str) -> Any:
    """The data set of this name: (train images, train labels, test images, test labels, classes)."""
    return getattr(data, name)()


class Training:
    """A preset's method, its optimizer and its own source of batches; `state()` and `load()` stop and resume it.

    The learning rate rises over the first tenth of `steps` and falls to zero along a cosine. Masks are drawn from
    torch's default generator, whose state is part of `state()`.
    """

    def __init__(self, name: str, *, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.name, self.preset, self.steps, self.step = name, PRESETS[name], steps, 0
        self.method = self.preset.make(steps)
        weights = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=self.preset.lr, weight_decay=self.preset.weight_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self.data = dataset(self.preset.data)

    def batch(self, size: int | None = None) -> Any:
        """What the method takes, from `size` training items drawn without replacement."""
        images, labels = self.data[:2]
        chosen = torch.randperm(len(images), generator=self.generator)[: size or self.preset.batch_size]
        options = VIEWS[self.preset.data]
        if self.preset.batch == "views":
            return data.two_views(images[chosen], generator=self.generator, **options)
        view = data.augment(images[chosen], generator=self.generator, **options)
        if self.preset.batch == "captions":
            return view, data.digit_captions(labels[chosen], generator=self.generator)
        return view

    def learning_rate(self) -> float:
        rising = (self.step + 1) / (WARMUP * self.steps + 1)
        return self.preset.lr * min(rising, (1 + math.cos(math.pi * self.step / self.steps)) / 2)

    def advance(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; the loss before it and the metrics, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, metrics = self.method(self.batch())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.method.after_step(self.step)
        self.step += 1
        return loss.detach(), metrics

    def run(self, steps: int | None = None, *, progress: bool = False) -> list[float]:
        """Train `steps` more, or to the end; the losses."""
        losses = []
        wanted = range(self.steps - self.step if steps is None else steps)
        bar = _progress(wanted, self.name, hidden=not progress)
        for _ in bar:
            losses.append(self.advance()[0].item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        return losses

    def features(self) -> tuple[Tensor, Tensor]:
        """Of the training and of the held-out items."""
        return extract_features(self.method, self.data[0]), extract_features(self.method, self.data[2])

    def knn(self) -> float:
        """Share of held-out items whose nearest training items name their class."""
        train, test = self.features()
        return knn_accuracy(train, self.data[1], test, self.data[3], k=NEIGHBORS)

    def state(self) -> dict[str, Any]:
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "default_generator": torch.get_rng_state(),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["default_generator"])
        self.step = state["step"]


VIEWS: dict[str, dict[str, Any]] = {"digits": data.DIGIT_VIEWS, "photographs": data.PHOTO_VIEWS}


def steps_in(name: str, seconds: float) -> int:
    """How many steps of this preset take `seconds` on this machine: timed on a few, after the first has warmed up."""
    trial, warm, timed = Training(name, steps=100), 2, 5
    trial.run(warm)
    started = time.perf_counter()
    trial.run(timed)
    return max(10, round(seconds * timed / (time.perf_counter() - started)))


def _progress(steps: range, name: str, *, hidden: bool) -> Any:
    from tqdm import tqdm

    return tqdm(steps, desc=f"{name:>9}", unit="step", disable=hidden)
