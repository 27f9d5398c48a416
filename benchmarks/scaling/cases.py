# SPDX-License-Identifier: Apache-2.0
"""The losses that are scaled, and who computes them: this library by each strategy, and peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import SEED, Contender, Inputs, recast
from benchmarks.cases import contrastive as inputs
from benchmarks.cases import correlation
from benchmarks.contenders import distributed as peers
from benchmarks.formulas import contrastive as formulas
from benchmarks.formulas import correlation as correlation_formulas
from sslkernels import losses
from sslkernels.distributed import STRATEGIES, Group

# One process with the rows of all ranks, or of one. Apart: every process computes as many pairs as in a loss over all
# ranks, alone, which is what the machine allows.
ALONE, FEWER, APART = "one process", "one process, one rank's rows", "apart"


@dataclass(frozen=True)
class Loss:
    name: str
    function: Callable[..., Tensor]
    inputs: Callable[..., Inputs]
    formula: Callable[..., Tensor]
    strategies: tuple[str, ...]
    peers: tuple[Contender, ...] = ()
    views: int = 1  # rows that meet each other, of a sample

    def make(self, N: int, D: int, dtype: torch.dtype | None = None) -> Inputs:
        """The inputs of all ranks."""
        made = self.inputs(torch.Generator().manual_seed(SEED), N=N, D=D)
        return {name: recast(value, dtype) for name, value in made.items()}

    def contenders(self, check: str | None = None, group: Any = "world") -> dict[str, Contender]:
        ours = (
            Contender(strategy, self.spanning(Group(group, strategy, check)), f"this library, strategy={strategy!r}")
            for strategy in self.strategies
        )
        return {c.name: c for c in (*ours, *self.peers)}

    def spanning(self, group: Group) -> Callable[..., Tensor]:
        return lambda **given: self.function(*given.values(), process_group=group)

    def alone(self) -> Contender:
        return Contender(ALONE, lambda **given: self.function(*given.values()), "this library in one process")


def part(whole: Inputs, rank: int, samples: Sequence[int]) -> Inputs:
    """A rank's rows, as leaves of its own."""
    return {name: _rows(value, rank, samples) for name, value in whole.items()}


def _rows(value: Any, rank: int, samples: Sequence[int]) -> Any:
    if not isinstance(value, Tensor):
        return value
    mine = value.detach().split(list(samples))[rank] if value.ndim else value.detach()
    return mine.clone().requires_grad_(value.requires_grad)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            "nt_xent", losses.nt_xent, inputs.nt_xent_inputs, formulas.nt_xent, STRATEGIES, views=2,
            peers=(Contender("lightly", peers.lightly_nt_xent, "lightly, NTXentLoss(gather_distributed=True)"),),
        ),
        Loss(
            "clip_loss", losses.clip_loss, inputs.clip_inputs, formulas.clip, STRATEGIES,
            peers=(Contender("open_clip", peers.open_clip_clip, f"open_clip, {peers.RIGHT_FLAGS}"),),
        ),
        Loss("siglip_loss", losses.siglip_loss, inputs.siglip_inputs, formulas.siglip, STRATEGIES),
        Loss(
            "barlow_twins_loss", losses.barlow_twins_loss, correlation.barlow_inputs, correlation_formulas.barlow_twins,
            STRATEGIES,
        ),
    )
}  # fmt: skip
