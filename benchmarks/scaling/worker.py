# SPDX-License-Identifier: Apache-2.0
"""One rank of a job: `python -m benchmarks.scaling.worker '{"job": "time", "rank": 0, ...}'` prints a line of JSON."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import memory
from benchmarks.case import ContenderStep
from benchmarks.scaling import jobs
from benchmarks.scaling.cases import ALONE, APART, FEWER, LOSSES, Loss, part
from benchmarks.stats import summary
from benchmarks.worker import timed

TINY = 8  # samples of a step that warms up
SIZES = (64, 2**14, 2**18, 2**20, 2**22, 2**23)  # bytes that a link is measured with


def slowest(seconds: list[float]) -> list[float]:
    """Of all ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def contestants(loss: Loss, n: int, D: int, names: list[str]) -> dict[str, tuple[ContenderStep, bool]]:
    """Steps by name, and whether all ranks take part. One process has n rows, and those of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, samples, known, alone = loss.make(n * world, D), [n] * world, loss.contenders(), loss.alone()
    made = {
        ALONE: (ContenderStep(alone, whole), False),
        FEWER: (ContenderStep(alone, part(whole, 0, samples)), False),
        APART: (ContenderStep(alone, loss.make(round(n * math.sqrt(world)), D)), True),
    }
    return made | {name: (ContenderStep(known[name], part(whole, rank, samples)), True) for name in names}


def interleave(
    steps: dict[str, tuple[ContenderStep, bool]], rounds: int, shortest: float
) -> dict[str, dict[str, list[float]]]:
    """`rounds` samples of each, taken in turn; of those with several ranks the slowest rank's time.

    "processor" is what a rank's threads, those of gloo included, were busy for in a step; waiting is not in it.
    """
    rank, halves = dist.get_rank(), ("forward", "backward", "processor")

    def sample(name: str, repeats: int) -> list[float]:
        step, together = steps[name]
        dist.barrier()
        busy = time.process_time()
        seconds = timed(step, repeats) if together or rank == 0 else (0.0, 0.0)
        return slowest([*seconds, (time.process_time() - busy) / repeats])

    repeats = {}
    for name in steps:
        sample(name, 1)
        repeats[name] = max(1, math.ceil(shortest / sum(sample(name, 1)[:2])))  # the same on all ranks
    samples: dict[str, dict[str, list[float]]] = {name: {half: [] for half in halves} for name in steps}
    names = list(steps)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for half, seconds in zip(halves, sample(name, repeats[name])):
                samples[name][half].append(seconds)
    return samples


def peak(loss: Loss, n: int, D: int, name: str) -> float:
    """MiB of a step beyond inputs and gradients. A tiny step first, and a product, as benchmarks.worker.peak does."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def step(samples: int) -> ContenderStep:
        contender = loss.alone() if world == 1 else loss.contenders()[name]
        return ContenderStep(contender, part(loss.make(samples * world, D), rank, [samples] * world))

    tiny = step(TINY)
    tiny.backward(tiny.forward())
    square = torch.ones(n, n)
    torch.mm(square, square)
    del square
    real = step(n)
    dist.barrier()
    return memory.peak_mib(lambda: real.backward(real.forward()))


def links(rounds: int) -> dict[str, list[list[float]]]:
    """(bytes that a rank sends, seconds, those of the processor) of each kind of transfer that a loss makes: lower
    quartiles, as what the processor does for others lengthens a short transfer by milliseconds."""
    world = dist.get_world_size()
    to, source = (dist.get_rank() - 1) % world, (dist.get_rank() + 1) % world

    def swap(x: Tensor, y: Tensor) -> None:
        ops = [dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, y, source)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    kinds: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, int]] = {  # and parts of x and of y
        "swap": (swap, 1, 1),
        "gather": (lambda x, y: dist.all_gather_into_tensor(y, x), 1, world),
        "scatter": (lambda x, y: dist.reduce_scatter_tensor(y, x), world, 1),
        "exchange": (lambda x, y: dist.all_to_all_single(y, x), world, world),
        "sum": (lambda x, y: dist.all_reduce(x), 1, 1),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for size in SIZES:
        for name, (call, x_parts, y_parts) in kinds.items():
            x, y = torch.zeros(x_parts * size // 4), torch.zeros(y_parts * size // 4)
            times = []
            for _ in range(rounds + 1):
                dist.barrier()
                start, busy = time.perf_counter(), time.process_time()
                call(x, y)
                times.append(slowest([time.perf_counter() - start, time.process_time() - busy]))
            sent = 2 * (world - 1) / world * size if name == "sum" else (world - 1) * size if name != "swap" else size
            found[name].append([sent, *(summary(list(part)).low for part in zip(*times[1:]))])
    return found


def arrived(rounds: int) -> float:
    """Of swaps of 4 MiB, the share that is there when arithmetic is over, before anybody waited for it."""
    world, product = dist.get_world_size(), torch.ones(512, 512)
    to, source = (dist.get_rank() - 1) % world, (dist.get_rank() + 1) % world
    x, there = torch.ones(2**20), 0
    for _ in range(rounds):
        y = torch.zeros_like(x)
        dist.barrier()
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, y, source)])
        start = time.perf_counter()
        while time.perf_counter() - start < 0.1:
            torch.mm(product, product)
        there += bool(y.all())
        for work in works:
            work.wait()
    return there / rounds


def run(job: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    store, wait = dist.FileStore(job["store"], job["world"]), timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["world"], timeout=wait)
    if job["job"] == "links":
        return {"links": links(job["rounds"]), "arrived": arrived(job["rounds"])}
    loss, n, D = LOSSES[job["loss"]], job["n"], job["D"]
    if job["job"] == "check":
        return jobs.check(job["loss"], n, D)
    if job["job"] == "time":
        return interleave(contestants(loss, n, D, job["names"]), job["rounds"], job["shortest"])
    if job["job"] == "memory":
        return peak(loss, n, D, job["name"])
    if job["job"] == "count":
        samples, everyone = [n] * job["world"], dist.group.WORLD
        return {name: jobs.count(everyone, job["loss"], samples, D, name, job["check"]) for name in loss.strategies}
    raise ValueError(f"job: expected links, check, time, memory or count, got {job['job']!r}")


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads do not outlive the others' sockets gracefully
