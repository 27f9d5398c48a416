# SPDX-License-Identifier: Apache-2.0
"""What is measured: cases, contenders, goals, and the two halves of a training step that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # tensors and numbers, passed by keyword to every contender of a case
SEED = 20240607


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    `call(**inputs)` returns the scalar loss. `prepare` gives the inputs the layout that the contender keeps
    between steps (MoCo's transposed queue); it is not timed.
    """

    name: str
    call: Callable[..., Tensor]
    source: str
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs


@dataclass(frozen=True)
class Goal:
    """A limit on `sslkernels` relative to `against`: a contender, or "eager", the fastest form that anyone ships.

    `at_least` is a speed-up (their time / ours); `at_most` a fraction (ours / theirs).
    """

    what: str  # "time" or "memory"
    against: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    shape: dict[str, int]
    inputs: Callable[..., Inputs]  # (generator, **shape) -> Inputs, float32
    formula: Callable[..., Tensor]  # float64 definition, called like a contender
    contenders: tuple[Contender, ...]
    eager: tuple[str, ...]  # the contenders that restate what somebody ships
    operands: Callable[[Inputs], tuple[Tensor, Tensor]]  # the two matrices of the bare GEMMs
    gemms: int  # how many bare GEMMs eager needs, forward and backward: 2 (only rows have a gradient) or 3
    images_per_row: float  # encoder passes (forward + backward) that one row of N costs in training
    goals: tuple[Goal, ...] = field(default=())

    def make_inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """The same float32 values in any dtype, so that a formula in float64 judges what float32 was given."""
        inputs = self.inputs(torch.Generator().manual_seed(SEED), **self.shape)
        return {name: recast(value, dtype) for name, value in inputs.items()}

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

    def step(self, name: str, inputs: Inputs) -> LossStep | GemmStep:
        if name == "gemm":
            return GemmStep(*self.operands(inputs), gemms=self.gemms)
        return LossStep(self.contender(name), inputs)


TINY = {"N": 24, "D": 16, "K": 96, "classes": 5}


def recast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}


class LossStep:
    def __init__(self, contender: Contender, inputs: Inputs):
        self.call = contender.call
        self.inputs = contender.prepare(inputs)
        self.leaves = tuple(leaves(self.inputs).values())

    def forward(self) -> Tensor:
        return self.call(**self.inputs)

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves)


class GemmStep:
    """The floor: the GEMMs of an eager step and nothing else, into memory that is already there."""

    def __init__(self, q: Tensor, k: Tensor, gemms: int):
        self.q, self.k, self.gemms = q, k, gemms
        self.logits = q.new_zeros(q.shape[0], k.shape[0])
        self.dq, self.dk = torch.zeros_like(q), torch.zeros_like(k)

    def forward(self) -> Tensor:
        return torch.mm(self.q, self.k.t(), out=self.logits)

    def backward(self, logits: Tensor) -> None:
        torch.mm(logits, self.k, out=self.dq)
        if self.gemms == 3:
            torch.mm(logits.t(), self.q, out=self.dk)
