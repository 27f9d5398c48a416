# SPDX-License-Identifier: Apache-2.0
"""What the ranks do for tests/benchmarks/test_bench_scaling.py; their group is all of them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.case import Contender, ContenderStep
from benchmarks.contenders import distributed as peers
from benchmarks.scaling import jobs
from benchmarks.scaling.cases import LOSSES, part


def check(group: Any, loss: str, n: int, D: int) -> dict[str, Any]:
    return jobs.check(loss, n, D)


def peak(group: Any, loss: str, n: int, D: int, strategy: str) -> int:
    """Most bytes of tensors that are alive at once in a step, beside its inputs."""
    from torch.profiler import ProfilerActivity, profile

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    given = part(LOSSES[loss].make(n * world, D), rank, [n] * world)
    step = ContenderStep(LOSSES[loss].contenders(group=group)[strategy], given)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.backward(step.forward())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def detached(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Gathered rows without their gradient, but for the own ones."""
    everything = []
    for x in (image, text):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach())
        parts[dist.get_rank()] = x
        everything.append(torch.cat(parts))
    return peers.clip_rows(image, text, *everything, logit_scale)


def without_gradient(group: Any, n: int, D: int) -> dict[str, Any]:
    return jobs.judge(LOSSES["clip_loss"], Contender("detached", detached, "a mistake"), n, D)
