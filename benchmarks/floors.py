# SPDX-License-Identifier: Apache-2.0
"""The floors: what a step can't do without, and nothing else, into memory that is already there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Inputs


@dataclass(frozen=True)
class Gemms:
    """The bare matrix products that an eager step needs, forward and backward."""

    operands: Callable[[Inputs], tuple[Tensor, Tensor]]
    count: int  # 1 (no gradient, or none through the product), 2 (only rows have a gradient) or 3
    name = "gemm"

    def step(self, inputs: Inputs, shape: dict[str, int], batches: int = 1) -> GemmStep:
        return GemmStep(*self.operands(inputs), self.count)

    def describe(self, shape: dict[str, int]) -> dict[str, int]:
        return {"products": self.count}


class GemmStep:
    def __init__(self, q: Tensor, k: Tensor, count: int):
        self.q, self.k = q, k
        self.logits = q.new_zeros(q.shape[0], k.shape[0])
        self.gradients = [torch.zeros_like(x) for x in (q, k)[: count - 1]]

    def restore(self) -> None:
        pass

    def forward(self) -> Tensor:
        return torch.mm(self.q, self.k.t(), out=self.logits)

    def backward(self, logits: Tensor) -> None:
        for out, (a, b) in zip(self.gradients, ((logits, self.k), (logits.t(), self.q))):
            torch.mm(a, b, out=out)


@dataclass(frozen=True)
class Grams:
    """The bare matrix products of two views in the space of the batch: z z^T of both, and one by each in the backward.
    All of the symmetric ones: whoever computes half of them may be faster."""

    views: Callable[[Inputs], tuple[Tensor, Tensor]]
    name = "gemm"

    def step(self, inputs: Inputs, shape: dict[str, int], batches: int = 1) -> GramStep:
        return GramStep(*self.views(inputs))

    def describe(self, shape: dict[str, int]) -> dict[str, int]:
        return {"products": 4}


class GramStep:
    def __init__(self, first: Tensor, second: Tensor):
        self.views = first, second
        self.grams = [z.new_zeros(len(z), len(z)) for z in self.views]
        self.gradients = [torch.zeros_like(z) for z in self.views]

    def restore(self) -> None:
        pass

    def forward(self) -> list[Tensor]:
        return [torch.mm(z, z.t(), out=gram) for z, gram in zip(self.views, self.grams)]

    def backward(self, grams: list[Tensor]) -> None:
        for z, gram, gradient in zip(self.views, reversed(grams), self.gradients):
            torch.mm(gram, z, out=gradient)


@dataclass(frozen=True)
class Copy:
    """A plain copy that reads and writes, together, as many bytes as the op has to read and write.

    `parts(**shape)` names what must be moved, in bytes: each input once, each result once.
    """

    parts: Callable[..., dict[str, int]]
    name = "copy"

    def step(self, inputs: Inputs, shape: dict[str, int], batches: int = 1) -> CopyStep:
        return CopyStep(sum(self.parts(**shape).values()), batches)

    def describe(self, shape: dict[str, int]) -> dict[str, int]:
        return self.parts(**shape)


class CopyStep:
    """From one of `batches` sources after the other into one target: a result's memory is used again."""

    def __init__(self, count: int, batches: int = 1):
        # Half of the bytes are read, half are written. Ones: pages of zeros would all be the same one.
        self.sources, self.turn = [torch.ones(count // 8) for _ in range(batches)], -1
        self.target = torch.zeros_like(self.sources[0])

    def restore(self) -> None:
        pass

    def forward(self) -> Tensor:
        self.turn = (self.turn + 1) % len(self.sources)
        return self.target.copy_(self.sources[self.turn])

    def backward(self, output: Tensor) -> None:
        pass
