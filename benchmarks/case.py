# SPDX-License-Identifier: Apache-2.0
"""What is measured: cases, contenders, goals, floors, and the two halves of a step that are timed.

A case is differentiable (its inputs hold leaves), or forward only (masks; no leaves), or in place (`changes`). Its
result is judged by a `formula` in float64 or, where it is random, by `holds`: what must be true of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = dict[str, Any]  # tensors, lists of tensors and numbers, passed by keyword to every contender of a case
SEED = 20240607
LIMIT = 1e-5  # relative error of float32 against float64, by norm for gradients: the library's numeric contract
COTANGENT = "cotangent"  # the input that weighs an output which is no scalar; the contenders do not see it


@dataclass(frozen=True)
class Contender:
    """One way to compute something: `call(**inputs)` returns a tensor, or several.

    `prepare` gives the inputs the layout that the contender keeps between steps (MoCo's transposed queue), and
    `result` gives its output the form that `Case.holds` reads (ids for a mask); neither is timed. `changes` names
    inputs that this contender alone overwrites (logits, by their gradient).
    """

    name: str
    call: Callable[..., Any]
    source: str
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    result: Callable[[Any], Any] = lambda output: output
    compile: bool = False  # timed as torch.compile makes it
    changes: tuple[str, ...] = ()
    real: bool = False  # a package as it is installed, where the others restate what it does
    limit: float = LIMIT  # the relative error up to which it is timed
    ignores: tuple[str, ...] = ()  # leaves of which it computes no gradient

    def compiled(self) -> Contender:
        return replace(self, name=f"{self.name}+compile", source=f"compiled: {self.source}", compile=True)


@dataclass(frozen=True)
class Goal:
    """A limit on `sslkernels` relative to `against`: a contender, a floor, or "eager", the fastest form anyone ships.

    `at_least` is a speed-up (their time / ours); `at_most` a fraction (ours / theirs).
    """

    what: str  # "time" or "memory"
    against: str
    at_least: float | None = None
    at_most: float | None = None


def faster(against: str, at_least: float) -> Goal:
    return Goal("time", against, at_least=at_least)


def within(against: str, at_most: float) -> Goal:
    return Goal("time", against, at_most=at_most)


def memory(against: str, at_most: float) -> Goal:
    return Goal("memory", against, at_most=at_most)


class Step(Protocol):
    """`restore` undoes, untimed, what the steps of the last sample did."""

    def restore(self) -> None: ...

    def forward(self) -> Any: ...

    def backward(self, output: Any) -> Any: ...


class Floor(Protocol):
    """What bounds everybody's time from below: `name` is its row in the tables."""

    @property
    def name(self) -> str: ...

    def step(self, inputs: Inputs, shape: dict[str, int], batches: int = 1) -> Step: ...

    def describe(self, shape: dict[str, int]) -> dict[str, int]: ...


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    shape: dict[str, int]
    inputs: Callable[..., Inputs]  # (generator, **shape) -> Inputs
    contenders: tuple[Contender, ...]
    eager: tuple[str, ...]  # the contenders that restate what somebody ships
    formula: Callable[..., Any] | None = None  # float64 definition, called like a contender
    holds: Callable[..., str | None] | None = None  # (result, **inputs): what is wrong with it, or None
    floor: Floor | None = None
    goals: tuple[Goal, ...] = field(default=())
    variant: str = ""  # tells apart cases of one op and shape
    changes: tuple[str, ...] = ()  # inputs that every contender overwrites
    fresh: bool = False  # timed on one batch after the other, so that none is in a cache
    slow: bool = False  # a round takes seconds: fewer of them where no goal is judged
    memory: bool = True  # whether peak memory says anything
    images_per_row: float = 0  # encoder passes (forward + backward) that one row of N costs in training; 0: no share

    def make_inputs(self, dtype: torch.dtype | None = None) -> Inputs:
        """The same values in any dtype, so that a formula in float64 judges what float32 was given."""
        inputs = self.inputs(torch.Generator().manual_seed(SEED), **self.shape)
        return {name: recast(value, dtype) for name, value in inputs.items()} if dtype else inputs

    def contender(self, name: str) -> Contender:
        for contender in self.contenders:
            if contender.name == name:
                return contender
        raise ValueError(f"case {self.name} has no contender {name!r}; it has {[c.name for c in self.contenders]}")

    def sized(self, **shape: int) -> Case:
        """The same case at another size: tests and warm-up steps use small ones."""
        return replace(self, shape={**self.shape, **shape})

    def tiny(self) -> Case:
        return self.sized(**{name: min(size, limit) for name, limit in TINY.items() if (size := self.shape.get(name))})

    def step(self, name: str, inputs: Inputs, *more: Inputs) -> Step:
        """On `inputs`, or on these and `more` in turn."""
        if self.floor and name == self.floor.name:
            return self.floor.step(inputs, self.shape, 1 + len(more))
        steps = [ContenderStep(self.contender(name), batch, self.changes) for batch in (inputs, *more)]
        return Rotation(steps) if more else steps[0]

    def floors(self) -> list[str]:
        return [self.floor.name] if self.floor else []


TINY = {
    "N": 24, "D": 16, "K": 96, "V": 80, "M": 24, "classes": 5, "B": 4, "pixels": 48, "L": 196, "T": 120, "grid": 14,
    "blocks": 1, "S": 24, "C": 12,
}  # fmt: skip


def recast(value: Any, dtype: torch.dtype | None) -> Any:
    """In another dtype where it is floating; without one, a copy that keeps its strides."""
    if isinstance(value, list):
        return [recast(v, dtype) for v in value]
    if not isinstance(value, Tensor) or (dtype and not value.is_floating_point()):
        return value
    copied = value.detach().to(dtype) if dtype else value.detach().clone()
    return copied.requires_grad_(value.requires_grad)


def held(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor)]


def leaves(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(x for value in inputs.values() for x in held(value) if x.requires_grad)


def cut(value: Any) -> Any:
    """A leaf in the place of each tensor that was computed; a leaf stays the tensor that it is: its memory is there
    before a step."""
    if isinstance(value, list):
        return [cut(v) for v in value]
    return value.detach().requires_grad_() if isinstance(value, Tensor) and not value.is_leaf else value


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def differentiable(output: Any) -> list[Tensor]:
    """A result may come with what has no gradient: the next centre of a teacher."""
    return [x for x in tensors(output) if x.requires_grad]


@cache
def compile_once(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, dynamic=False)


class ContenderStep:
    """Forward is the call, backward the gradient of every leaf. `attached`: the leaves are those of `inputs`, even
    where `prepare` lays them out anew; a timed step starts from what `prepare` made. What the call overwrites is the
    step's own."""

    def __init__(self, contender: Contender, inputs: Inputs, changes: Sequence[str] = (), attached: bool = False):
        self.call = compile_once(contender.call) if contender.compile else contender.call
        self.initial = {name: inputs[name] for name in (*changes, *contender.changes)}
        inputs = {**inputs, **{name: recast(value, None) for name, value in self.initial.items()}}
        self.cotangent = inputs.pop(COTANGENT, None)
        prepared = contender.prepare(inputs)
        self.inputs = prepared if attached else {name: cut(value) for name, value in prepared.items()}
        owner = inputs if attached else self.inputs
        self.leaves = leaves(owner)
        self.trained = [
            name not in contender.ignores for name, value in owner.items() for x in held(value) if x.requires_grad
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for name, initial in self.initial.items():
                torch._foreach_copy_(held(self.inputs[name]), held(initial))

    def forward(self) -> Any:
        return self.call(**self.inputs)

    def backward(self, output: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(differentiable(output), self.leaves, self.cotangent) if self.leaves else ()


class Rotation:
    """Steps that take turns."""

    def __init__(self, steps: Sequence[Step]):
        self.steps, self.turn = steps, -1

    def restore(self) -> None:
        for step in self.steps:
            step.restore()

    def forward(self) -> Any:
        self.turn = (self.turn + 1) % len(self.steps)
        return self.steps[self.turn].forward()

    def backward(self, output: Any) -> Any:
        return self.steps[self.turn].backward(output)
