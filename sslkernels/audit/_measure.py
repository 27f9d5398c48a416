# SPDX-License-Identifier: Apache-2.0
"""One rank's part of an audit: the loss of all rows alone, then that of the own rows among the others."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslkernels.audit._inputs import INPUTS, Encoder, Inputs, guess

Gradients = dict[str, Tensor]


class Task(NamedTuple):
    """What is asked of all ranks. target: what makes the loss, or the loss; sizes: the rows of each rank."""

    target: Any
    arguments: dict[str, Any]
    inputs: str | Inputs
    sizes: Sequence[int]
    dim: int
    steps: int


class Step(NamedTuple):
    """A loss and its gradients; `features` is that of the encoder's outputs, below each other."""

    loss: float
    gradients: Gradients
    features: Tensor


class Measured(NamedTuple):
    """Steps of one process on all rows, of each rank on its own rows alone, and of the ranks together.

    own: the mean over the ranks of the loss and the gradients of own rows, and the mean weighted by the rows; None
    where the loss refuses so few. travels: whether the loss of rank 0 has a gradient in the features of another rank.
    """

    sizes: Sequence[int]
    true: list[Step]
    own: list[tuple[Step, float]] | None
    together: list[Step]
    travels: bool


def make_loss(task: Task, rank: int, world: int) -> Callable[..., Any]:
    """A fresh loss: a class or function that needs no argument makes it, anything else is called as the loss.

    `rank` and `world_size` are handed over where they are among the arguments by name.
    """
    target, arguments = task.target, dict(task.arguments)
    if isinstance(target, nn.Module):
        return copy.deepcopy(target).double()
    parameters = inspect.signature(target).parameters
    arguments |= {
        name: value
        for name, value in (("rank", rank), ("world_size", world))
        if name in parameters and name not in arguments
    }
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in variadic]
    if not inspect.isclass(target) and set(required) - set(arguments):
        return functools.partial(target, **arguments)
    loss = target(**arguments)
    if not callable(loss):
        raise TypeError(f"{target} must make a loss that can be called, got {type(loss).__name__}")
    return loss.double() if isinstance(loss, nn.Module) else loss


class _Model(nn.Module):
    def __init__(self, task: Task, rank: int, world: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(task.dim).double()
        self.loss = make_loss(task, rank, world)
        kind = guess(self.loss) if task.inputs == "auto" else task.inputs
        self.inputs = INPUTS[kind] if isinstance(kind, str) else kind

    def step(self, rows: Sequence[Tensor], weight: float = 1.0) -> Step:
        self.zero_grad()
        self.encoder.features.clear()
        loss = self.inputs.call(self.loss, self.encoder, *rows)
        if isinstance(loss, dict):
            loss = _of(loss)
        elif isinstance(loss, tuple):
            loss = loss[0]
        (loss * weight).backward()
        gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        features = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.encoder.features]
        return Step(float(loss.detach()), gradients, torch.stack(features, 1))


def _of(losses: dict[str, Any]) -> Tensor:
    """The loss among what a loss returns by name: "loss", or else the sum of what has a gradient."""
    if "loss" in losses:
        return losses["loss"]
    terms = [x for x in losses.values() if isinstance(x, Tensor) and x.requires_grad]
    if not terms:
        raise TypeError(f"the loss must return a tensor that requires a gradient, got {', '.join(losses)} without")
    return torch.stack(terms).sum()


def _rows(task: Task, seed: int) -> list[list[Tensor]]:
    """What each rank takes of a step's data; that of higher ranks is larger, so that statistics differ."""
    kind = INPUTS.get(task.inputs, INPUTS["views"]) if isinstance(task.inputs, str) else task.inputs
    if task.inputs == "auto":
        kind = _Model(task, 0, 1).inputs
    parts = [
        x.split(list(task.sizes)) for x in kind.data(sum(task.sizes), task.dim, torch.Generator().manual_seed(seed))
    ]
    return [
        [(1 + rank) * part[rank].double() if part[rank].is_floating_point() else part[rank] for part in parts]
        for rank in range(len(task.sizes))
    ]


def _mean(steps: Sequence[Step]) -> Step:
    names = dict.fromkeys(name for step in steps for name in step.gradients)
    gradients = {
        name: sum((s.gradients[name] for s in steps if name in s.gradients), torch.zeros(())) / len(steps)
        for name in names
    }
    return Step(sum(s.loss for s in steps) / len(steps), gradients, torch.cat([s.features for s in steps]) / len(steps))


def _alone(task: Task, data: Sequence[Sequence[Sequence[Tensor]]]) -> tuple[list[Step], Any]:
    """All rows in one process, and the own rows of each rank in one process each."""
    whole = _Model(task, 0, 1)
    true = [whole.step([torch.cat(x) for x in zip(*rows)]) for rows in data]
    share = [size / sum(task.sizes) for size in task.sizes]
    try:
        ranks = [_Model(task, 0, 1) for _ in task.sizes]
        own = [[model.step(part) for model, part in zip(ranks, rows)] for rows in data]
    except Exception:
        return true, None
    return true, [(_mean(steps), sum(s.loss * w for s, w in zip(steps, share))) for steps in own]


def measure(task: Task, rank: int, world: int, join: Callable[[], None]) -> Measured | None:
    """On rank 0 what was measured; `join` makes the default process group, before which every loss is alone."""
    import torch.distributed as dist

    data = [_rows(task, seed) for seed in range(task.steps)]
    alone = _alone(task, data) if rank == 0 else None
    join()
    model, together = _Model(task, rank, world), []
    for rows in data:
        together.append(_mean(_gathered(model.step(rows[rank]), world)))
    probe = _Model(task, rank, world).step(data[0][rank], weight=float(rank == 0))
    travels = any(float(step.features.norm()) > 0 for step in _gathered(probe, world)[1:])
    dist.barrier()
    return Measured(task.sizes, *alone, together, travels) if alone else None


def _gathered(step: Step, world: int) -> list[Step]:
    import torch.distributed as dist

    steps: list[Any] = [None] * world
    dist.all_gather_object(steps, step)
    return steps
