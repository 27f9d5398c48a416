# SPDX-License-Identifier: Apache-2.0
"""A training loop for the presets: real data, AdamW under a cosine schedule, and what the features are worth."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sslkernels import data, speech, text, video, words
from sslkernels.distributed import Batch
from sslkernels.distributed._group import span
from sslkernels.evaluation import context_accuracy, extract_features, knn_accuracy, linear_probe
from sslkernels.methods import BERT, Word2Vec
from sslkernels.nn import global_batch_norm
from sslkernels.presets import PRESETS

__all__ = ["TITLES", "Training", "dataset", "steps_in"]

WARMUP = 0.1  # of all steps
NEIGHBORS = 5


# The data sets by the name in `Preset.data`: (train items, train labels, test items, test labels, classes, ...).
DATA: dict[str, Callable[[], Any]] = {
    "digits": data.digits,
    "photographs": data.photographs,
    "clips": video.clips,
    "conversation": speech.speech,
    "words": words.word_pairs,
    "news": lambda: text.passages(text.lee_background(), length=16, vocab_size=256),
}


@functools.cache
def dataset(name: str) -> Any:
    """The data set of this name, made once."""
    return DATA[name]()


class Training:
    """A preset's method, its optimizer and its own source of batches; `state()` and `load()` stop and resume it.

    The learning rate rises over the first tenth of `steps` and falls to zero along a cosine. Masks are drawn from
    torch's default generator, whose state is part of `state()`.

    With `process_group`, "world" or a group of torch.distributed, the ranks train as one process does: all draw the
    same batch, each takes its part of the rows, batch norm and loss are of all rows, and DistributedDataParallel
    averages. Losses, states and scores are the same on all ranks, and up to rounding those of one process; but for
    wav2vec 2.0, where each rank draws distractors and the quantizer's noise for its own rows: near, not equal.
    """

    def __init__(
        self,
        name: str,
        *,
        steps: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        process_group: Any = None,
    ) -> None:
        torch.manual_seed(seed)
        self.name, self.preset, self.steps, self.step = name, PRESETS[name], steps, 0
        group, rank, world, strategy, _ = span(process_group)
        self.ranks = Batch(group, rank, world, strategy, 1, None)
        self.method = self.preset.make(steps, process_group=process_group).to(dtype)
        self.model: nn.Module = self.method
        if not self.ranks.local:
            self.model = _averaged(global_batch_norm(self.method, process_group), process_group)
        weights = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=self.preset.lr, weight_decay=self.preset.weight_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self.data = tree_map(lambda x: x.to(dtype) if _floating(x) else x, dataset(self.preset.data))
        if self.preset.standardize:
            items = self.data[0]
            axes = [0, *range(2, items.ndim)]  # all but the channels
            self.mean, self.std = items.mean(axes, keepdim=True), items.std(axes, keepdim=True)

    def batch(self, size: int | None = None) -> Any:
        """What the method takes, from `size` training items drawn without replacement; this rank's part of it."""
        chosen = torch.randperm(len(self.data[0]), generator=self.generator)[: size or self.preset.batch_size]
        batch = BATCHES[self.preset.batch](self, chosen)
        if self.ranks.local:
            return batch
        return tree_map(lambda x: x.tensor_split(self.ranks.world)[self.ranks.rank], batch)

    def standardize(self, items: Tensor) -> Tensor:
        """Transformers alone take standardised items: beside fixed positions, values in [0, 1] are hardly seen."""
        return (items - self.mean) / self.std if self.preset.standardize else items

    def learning_rate(self) -> float:
        rising = (self.step + 1) / (WARMUP * self.steps + 1)
        return self.preset.lr * min(rising, (1 + math.cos(math.pi * self.step / self.steps)) / 2)

    def advance(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; the loss before it, of all ranks, and this rank's metrics, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, metrics = self.model(self.batch())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.method.after_step(self.step)
        self.step += 1
        return self.ranks.sum(loss.detach()) / self.ranks.world, metrics

    def run(self, steps: int | None = None, *, progress: bool = False) -> list[float]:
        """Train `steps` more, or to the end; the losses."""
        losses = []
        wanted = range(self.steps - self.step if steps is None else steps)
        bar = _progress(wanted, self.name, hidden=not progress or self.ranks.rank > 0)
        for _ in bar:
            losses.append(self.advance()[0].item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        return losses

    def features(self) -> tuple[Tensor, Tensor]:
        """Of the training and of the held-out items."""
        train, test = (self.standardize(self.data[part]) for part in (0, 2))
        return extract_features(self.method, train), extract_features(self.method, test)

    def accuracy(self) -> dict[str, float]:
        """What the method is worth on the held-out items: scores from 0 to 1, which `TITLES` names."""
        return SCORES[self.preset.scores](self if self.ranks.local else self.alone())

    def alone(self) -> Training:
        """The method as it is now, in this process and no others, to be looked at."""
        with torch.random.fork_rng(devices=[]):
            found = Training(self.name, steps=self.steps, dtype=next(self.method.parameters()).dtype)
        found.method.load_state_dict(self.method.state_dict())
        return found

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
CROPS: dict[str, dict[str, Any]] = {"digits": data.DIGIT_CROPS, "photographs": data.PHOTO_CROPS}


def _items(training: Training, chosen: Tensor) -> Tensor:
    return training.standardize(training.data[0][chosen])


def _view(training: Training, chosen: Tensor) -> Tensor:
    options = VIEWS[training.preset.data]
    return training.standardize(data.augment(training.data[0][chosen], generator=training.generator, **options))


def _two_views(training: Training, chosen: Tensor) -> tuple[Tensor, Tensor]:
    options = VIEWS[training.preset.data]
    return data.two_views(training.data[0][chosen], generator=training.generator, **options)


def _crops(training: Training, chosen: Tensor) -> list[Tensor]:
    options = CROPS[training.preset.data]
    crops = data.multi_crop(training.data[0][chosen], generator=training.generator, **options)
    return [training.standardize(crop) for crop in crops]


def _captioned(training: Training, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return _view(training, chosen), data.digit_captions(training.data[1][chosen], generator=training.generator)


def _columns(training: Training, chosen: Tensor) -> tuple[Tensor, ...]:
    return training.data[0][chosen].unbind(1)


# What a step takes of the chosen items, by the name in `Preset.batch`.
BATCHES: dict[str, Callable[[Training, Tensor], Any]] = {
    "images": _view, "views": _two_views, "crops": _crops, "captions": _captioned, "clips": _items,
    "pairs": _columns, "tokens": _items, "waveforms": _items,
}  # fmt: skip


def _features(training: Training) -> dict[str, float]:
    """Shares of the held-out items named rightly by their nearest training items, and by a linear classifier."""
    train, test = training.features()
    labels = training.data[1], training.data[3]
    return {
        "knn": knn_accuracy(train, labels[0], test, labels[1], k=NEIGHBORS),
        "probe": linear_probe(train, labels[0], test, labels[1]),
    }


def _contexts(training: Training) -> dict[str, float]:
    """Whether a held-out word knows its context from another's."""
    method = training.method
    assert isinstance(method, Word2Vec)
    return {"contexts": context_accuracy(method.input_weight, method.output_weight, training.data[1])}


def _speech(training: Training) -> dict[str, float]:
    """Those of the features, and how often the method is right at its own task, on the held-out items."""
    generator = torch.Generator().manual_seed(0)
    right = extract_features(
        training.method,
        training.data[2],
        encode=lambda items: training.method.pretext_accuracy(items, generator=generator)[None],  # type: ignore[operator]
        batch_size=training.preset.batch_size,
    )
    return {**_features(training), "pretext": float(right.mean())}


def _masked_tokens(training: Training) -> dict[str, float]:
    """The share of the [MASK]s in held-out passages that are named rightly."""
    method, generator = training.method, torch.Generator().manual_seed(0)
    assert isinstance(method, BERT)
    inputs, labels = method.mask(training.data[2], generator)
    named = extract_features(method, inputs, encode=method.fill)
    return {"masked": (named == labels)[inputs == method.mask_token].double().mean().item()}


# What `Training.accuracy` tells, by the name in `Preset.scores`; and what each score is called.
SCORES: dict[str, Callable[[Training], dict[str, float]]] = {
    "features": _features,
    "contexts": _contexts,
    "speech": _speech,
    "masked": _masked_tokens,
}
TITLES = {
    "knn": "kNN accuracy, %",
    "probe": "linear probe, %",
    "contexts": "contexts known, %",
    "pretext": "its own task, %",
    "masked": "[MASK]s named, %",
}


def steps_in(name: str, seconds: float, *, process_group: Any = None) -> int:
    """How many steps of this preset take `seconds` on this machine: timed on a few, after the first has warmed up.

    Of several ranks the mean, the same on all.
    """
    trial, warm, timed = Training(name, steps=100, process_group=process_group), 2, 5
    trial.run(warm)
    started = time.perf_counter()
    trial.run(timed)
    steps = max(10, round(seconds * timed / (time.perf_counter() - started)))
    return int(trial.ranks.sum(torch.tensor(steps))) // trial.ranks.world


def _averaged(method: nn.Module, process_group: Any) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    group = None if isinstance(process_group, str) else process_group
    # prototypes that are frozen at first have no gradient then
    frozen = any(getattr(method, name, 0) for name in ("freeze_prototypes_steps", "freeze_last_layer_steps"))
    return DistributedDataParallel(method, process_group=group, find_unused_parameters=frozen)


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _progress(steps: range, name: str, *, hidden: bool) -> Any:
    from tqdm import tqdm

    return tqdm(steps, desc=f"{name:>9}", unit="step", disable=hidden)
