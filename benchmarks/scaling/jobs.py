# SPDX-License-Identifier: Apache-2.0
"""What every rank of a group does together: judge the contenders by the contract, and count what a step sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.case import Contender, ContenderStep, leaves
from benchmarks.scaling import counting
from benchmarks.scaling.cases import LOSSES, Loss, part
from benchmarks.worker import relative_error, worst


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def judge(loss: Loss, contender: Contender, n: int, D: int) -> dict[str, Any]:
    """The contract: the mean of the losses, and the gradients that an average leaves, are the formula's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = loss.make(n * world, D, torch.float64)
    value = loss.formula(**whole)
    exact = torch.autograd.grad(value, leaves(whole))
    step = ContenderStep(contender, part(loss.make(n * world, D), rank, [n] * world), attached=True)
    output = step.forward()
    value_error = relative_error(gathered(output.detach().reshape(1).double()).mean(), value.detach())
    gradient_error = worst(
        relative_error(gathered(g) / world if e.ndim else gathered(g.reshape(1)).mean(), e)
        for g, e in zip(step.backward(output), exact, strict=True)
    )
    # Written so that a NaN fails.
    ok = value_error <= contender.limit and gradient_error <= contender.limit
    return {"ok": ok, "value_error": value_error, "gradient_error": gradient_error}


def check(loss: str, n: int, D: int) -> dict[str, Any]:
    return {name: judge(LOSSES[loss], contender, n, D) for name, contender in LOSSES[loss].contenders().items()}


def count(
    group: Any, loss: str, samples: Sequence[int], D: int, strategy: str, agreement: str
) -> list[tuple[float, float]]:
    """Of forward and of backward: bytes that this rank sends, and beside them those of comparing what ranks bring."""
    rank, whole = dist.get_rank(group), LOSSES[loss].make(sum(samples), D)
    contender = LOSSES[loss].contenders(agreement, group)[strategy]
    step = ContenderStep(contender, part(whole, rank, samples))
    with counting.counted() as forward:
        output = step.forward()
    with counting.counted() as backward:
        step.backward(output)
    return [(counting.total(found), counting.total(found, agreement=True)) for found in (forward, backward)]
