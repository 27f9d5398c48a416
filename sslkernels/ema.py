# SPDX-License-Identifier: Apache-2.0
"""The moving average of a model, as a module: momentum encoders, teachers, averaged weights for evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.ops import ema_update_
from sslkernels.ops.ema import ROUNDED, dense_format, local_shards

__all__ = ["EMA"]

SCHEDULES = ("constant", "linear", "cosine")
BUFFERS = ("copy", "average", "ignore")
SWAPPED_AT_ONCE = 2**20  # elements
Pair = tuple[str, Tensor, Tensor]  # what it is, the average's, the model's


class EMA(nn.Module):
    """A model's exponential moving average, which follows the model from step to step.

        m_k = momentum                                                                     "constant"
            = final + (momentum - final) * max(0, 1 - k / total_steps)                     "linear": I-JEPA, data2vec
            = final + (momentum - final) * (1 + cos(pi * min(1, k / total_steps))) / 2     "cosine": BYOL, DINO
        average <- m_k * average + (1 - m_k) * model        at update number k = 0, 1, ...

    The average starts as a copy of the model, in the same mode (`train()` or `eval()`; as a submodule it follows its
    parent's), without gradients. Parameters are matched by name; a parameter that has several names is averaged once.
    Wrappers by DistributedDataParallel and torch.compile are looked through. DTensors (FSDP2) are averaged shard by
    shard; every rank calls `update`.

    bfloat16 and float16 averages are rounded stochastically, so that they never stall; the random numbers depend on
    the step alone, so replicas stay alike and no generator moves. `dtype=torch.float32` keeps full precision.

    A model on the meta device gives an average on the meta device: `ema.to_empty(device=...)`, then `ema.set(model)`
    or `load_state_dict`, before the first update. The average of a model whose parameters are sharded afterwards is
    made the same way: `fully_shard(ema.module)` as the model is.

    Args:
        model: any module that `copy.deepcopy` copies.
        momentum: of the first step, in [0, 1].
        final_momentum: of the last step, 1 if not given; for "linear" and "cosine".
        total_steps: of the schedule; from then on the momentum is the final one.
        schedule: "constant", "linear" or "cosine".
        use_buffers: "copy" the model's buffers, "average" the floating ones and copy the rest, or "ignore" them:
            the average has statistics of its own (BYOL, MoCo).
        dtype: of the average's floating parameters and buffers; the model's if not given.
        device: of the average; the model's if not given.

    Attributes:
        module: the averaged copy. Its own `state_dict` has the model's names, and loads a plain model's checkpoint.
        step: the number of updates so far; in the state_dict, as extra state, so that a schedule resumes.

    Raises:
        ValueError, TypeError: options out of range; at `update`, `set`, `swap` a model with other parameters than the
            average has, by name, before anything is written.

    Example:
        >>> student = nn.Linear(4, 2)
        >>> teacher = EMA(student, 0.996, schedule="cosine", total_steps=1000)
        >>> teacher.update(student)  # after each optimizer step
        >>> teacher(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
        >>> with teacher.average_parameters(student):
        ...     pass  # the student has the averaged weights here

    Source: BYOL (arXiv:2006.07733), I-JEPA (arXiv:2301.08243), data2vec (arXiv:2202.03555).
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.996,
        *,
        final_momentum: float | None = None,
        total_steps: int | None = None,
        schedule: str = "constant",
        use_buffers: str = "copy",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check.choice("schedule", schedule, SCHEDULES)
        check.choice("use_buffers", use_buffers, BUFFERS)
        if schedule == "constant":
            if final_momentum is not None or total_steps is not None:
                raise ValueError('final_momentum and total_steps are of schedule "linear" or "cosine", got "constant"')
        elif total_steps is None:
            raise ValueError(f'schedule "{schedule}" needs total_steps')
        final = 1.0 if final_momentum is None else final_momentum
        for name, x in (("momentum", momentum), ("final_momentum", final)):
            if isinstance(x, bool) or not isinstance(x, int | float):
                raise TypeError(f"{name} must be a number, got {type(x).__name__}")
            if not 0 <= x <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {x}")
        if total_steps is not None:
            check.positive("total_steps", total_steps)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        self.momentum, self.final_momentum, self.total_steps = momentum, final, total_steps
        self.schedule, self.use_buffers = schedule, use_buffers
        model = _unwrapped(model)
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"model has an uninitialized parameter, {name!r}: run the model once before")
        self.module = copy.deepcopy(model).requires_grad_(False).to(device=device, dtype=dtype)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if dense_format(tensor) is None:  # what ema_update_ does not write to
                tensor.data = tensor.data.contiguous()
        firsts: dict[Any, nn.Parameter] = {}
        for own, given in zip(self.module.parameters(), model.parameters()):
            if type(given.data) is Tensor and _place(given):  # copy.deepcopy separates parameters that are one memory
                own.data = firsts.setdefault(_place(given), own).data
        self.step = 0  # no buffer: one on the CPU breaks DistributedDataParallel over NCCL, one elsewhere needs a sync

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's."""
        return self.module(*args, **kwargs)

    def momentum_at(self, step: int) -> float:
        """The momentum of update number `step`, which counts from 0."""
        if self.total_steps is None:
            return self.momentum
        done = min(1.0, max(0.0, step / self.total_steps))
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_momentum + (self.momentum - self.final_momentum) * left

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move the average towards the model, and count the step; `step` overrules the average's own count."""
        if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
            raise TypeError(f"step must be an integer, got {type(step).__name__}")
        number = self.step if step is None else step
        averaged, copied = self._pairs(model, buffers=self.use_buffers != "ignore")
        if self.use_buffers == "average":
            averaged, copied = averaged + copied, []
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for _, target, source in averaged:
            targets, sources = by_device.setdefault(target.device, ([], []))
            targets.append(target)
            sources.append(source.to(target.device))
        for targets, sources in by_device.values():
            rounds = any(x.dtype in ROUNDED for x in targets)
            seed = number if rounds else None
            ema_update_(targets, sources, self.momentum_at(number), stochastic_rounding=rounds, seed=seed)
        _copy(copied)
        self.step = number + 1

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the average a copy of the model, buffers too; the step stays."""
        for pairs in self._pairs(model, buffers=True):
            _copy(pairs)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the weights of average and model in place, piece by piece; buffers too unless they are ignored.

        Both must have the same dtypes and devices: a round trip through another dtype would lose what the average has
        and the model cannot hold. `average_parameters` serves those.
        """
        pairs = self._exchanged(model)
        for name, target, source in pairs:
            if not _alike(target, source):
                raise ValueError(
                    f"{name} is {target.dtype} on {target.device} in the average and {source.dtype} on "
                    f"{source.device} in the model: they cannot be swapped without loss; use average_parameters"
                )
        _swap(pairs)

    @contextmanager
    def average_parameters(self, model: nn.Module) -> Iterator[nn.Module]:
        """A context in which the model has the averaged weights (and buffers, unless they are ignored).

        They are swapped in place, which takes no memory; tensors whose dtype or device differs from the average's are
        kept aside instead. At the end, or at an exception, both are as they were. Train nothing within it.
        """
        pairs = self._exchanged(model)
        swapped = [pair for pair in pairs if _alike(*pair[1:])]
        others = [pair for pair in pairs if not _alike(*pair[1:])]
        with torch.no_grad():
            kept = [source.clone() for _, _, source in others]
            _swap(swapped)
            for _, target, source in others:
                source.copy_(target)
        try:
            yield model
        finally:
            with torch.no_grad():
                _swap(swapped)
                for (_, _, source), own in zip(others, kept):
                    source.copy_(own)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def _exchanged(self, model: nn.Module) -> list[Pair]:
        parameters, buffers = self._pairs(model, buffers=self.use_buffers != "ignore")
        return parameters + buffers

    def _pairs(self, model: nn.Module, *, buffers: bool) -> tuple[list[Pair], list[Pair]]:
        """The parameters and the buffers of average and model, matched by name, local shards where they are sharded."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        model = _unwrapped(model)
        return (
            _matched("parameter", self.module.named_parameters(), model.named_parameters()),
            _matched("buffer", self.module.named_buffers(), model.named_buffers()) if buffers else [],
        )

    def extra_repr(self) -> str:
        said = f"momentum={self.momentum}, schedule={self.schedule!r}, use_buffers={self.use_buffers!r}"
        if self.total_steps is None:
            return said
        return f"{said}, final_momentum={self.final_momentum}, total_steps={self.total_steps}"


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _place(x: Tensor) -> tuple[Any, ...] | None:
    """What two parameters have in common that are one memory."""
    return (x.data_ptr(), x.shape, x.stride()) if x.numel() and not x.is_meta else None


def _matched(kind: str, averages: Iterable[tuple[str, Tensor]], models: Iterable[tuple[str, Tensor]]) -> list[Pair]:
    """Pairs of one name, each memory once. A compiled submodule has the names that it had before."""
    targets, sources = ({name.replace("_orig_mod.", ""): x for name, x in xs} for xs in (averages, models))
    if targets.keys() != sources.keys():
        name = next(name for name in (*targets, *sources) if name not in targets or name not in sources)
        where = ("average", "model") if name in targets else ("model", "average")
        raise ValueError(f"the {where[0]} has a {kind} {name!r}, the {where[1]} has none, or shares it with another")
    pairs: list[Pair] = []
    places: dict[Any, int] = {}
    for name, target in targets.items():
        label, source = f"{kind} {name!r}", sources[name]
        if target.shape != source.shape:
            raise ValueError(
                f"{label} has shape {tuple(target.shape)} in the average and {tuple(source.shape)} in the model"
            )
        if target.is_floating_point() != source.is_floating_point():
            raise TypeError(f"{label} is {target.dtype} in the average and {source.dtype} in the model")
        if target.is_meta and not source.is_meta:
            raise ValueError(
                f"{label} of the average is on the meta device: call to_empty(device=...), then set(model), first"
            )
        target, source = local_shards(target, source, f"the average's {label}", f"the model's {label}")
        if not _place(source) or places.setdefault(_place(source), len(pairs)) == len(pairs):  # else seen, in both
            pairs.append((label, target, source))
    return pairs


def _copy(pairs: Iterable[Pair]) -> None:
    for _, target, source in pairs:
        target.copy_(source)


def _alike(target: Tensor, source: Tensor) -> bool:
    return target.dtype == source.dtype and target.device == source.device


def _swap(pairs: Iterable[Pair]) -> None:
    """Exchange the contents of each pair, with a copy of SWAPPED_AT_ONCE elements (of a row, if that is longer)."""
    for _, target, source in pairs:
        if target.ndim == 0:
            target, source = target[None], source[None]
        rows = max(1, SWAPPED_AT_ONCE * target.shape[0] // max(1, target.numel()))
        for a, b in zip(target.split(rows), source.split(rows)):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
