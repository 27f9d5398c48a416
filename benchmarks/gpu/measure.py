# SPDX-License-Identifier: Apache-2.0
"""Times a case on a GPU: contenders in turn between device events, their peak memory, and the processor's share."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import (
    Contender,
    ContenderStep,
    Inputs,
    Rotation,
    Step,
    held,
    leaves,
    recast,
)
from benchmarks.gpu.cases import GpuCase
from benchmarks.stats import OURS
from benchmarks.worker import compare, exact

DEVICE = "cuda"
SAMPLE = 5e-3  # seconds that one sample lasts at least
MEBI = 2**20
HOST_STEPS = 50
FRESH = 1e9  # bytes


def placed(value: Any, dtype: torch.dtype | None) -> Any:
    """On the device, in another dtype where it is floating."""
    if isinstance(value, list):
        return [placed(v, dtype) for v in value]
    if isinstance(value, nn.Module):
        return value.to(DEVICE)
    if not isinstance(value, Tensor):
        return value
    target = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return value.detach().to(DEVICE, target).requires_grad_(value.requires_grad)


def place(inputs: Inputs, dtype: torch.dtype, wide: tuple[str, ...]) -> Inputs:
    return {name: placed(value, None if name in wide else dtype) for name, value in inputs.items()}


class GpuStep(ContenderStep):
    """Under autocast, as mixed precision training calls a loss: what is fragile in 16 bits runs in float32."""

    def __init__(self, contender: Contender, inputs: Inputs, changes: tuple[str, ...], mixed: bool):
        super().__init__(contender, inputs, changes)
        self.inputs = {name: placed(value, None) for name, value in self.inputs.items()}
        self.leaves, self.mixed = leaves(self.inputs), mixed

    def forward(self) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.mixed):
            return super().forward()


def step_of(gpu: GpuCase, contender: Contender, inputs: Inputs) -> Step:
    """A case that wants fresh batches has so many that the last one has left the L2 cache."""
    size = sum(x.nbytes for value in inputs.values() for x in held(value))
    batches = [inputs]
    for _ in range(math.ceil(FRESH / size) - 1 if gpu.case.fresh else 0):
        batches.append({name: recast(value, None) for name, value in inputs.items()})
    steps = [GpuStep(contender, batch, gpu.case.changes, mixed=gpu.dtype != torch.float32) for batch in batches]
    return Rotation(steps) if len(steps) > 1 else steps[0]


def ceilings() -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and bfloat16 operations a second of a large product."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    copy = best(lambda: target.copy_(source))
    product = best(lambda: torch.mm(a, b, out=out))
    return {"copy": 2 * source.nbytes / copy, "bfloat16": 2 * 8192**3 / product}


def best(call: Callable[[], Any], count: int = 20) -> float:
    """Seconds of one call, the median of several after a warm-up."""
    for _ in range(3):
        call()
    found = sorted(between(call) for _ in range(count))
    return found[count // 2]


def between(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def check(gpu: GpuCase, contender: Contender) -> dict[str, Any]:
    """At a small size, against the formula in float64 of the very numbers that 16 bits hold."""
    case = gpu.checked()
    given = place(case.make_inputs(), gpu.dtype, gpu.wide)
    expected = exact(case, {name: recast(value, torch.float64) for name, value in given.items()})
    step = GpuStep(contender, given, case.changes, mixed=gpu.dtype != torch.float32)
    return compare(contender, step, *expected)


def timed(step: Step, repeats: int) -> tuple[float, float]:
    """Seconds of one forward and one backward on the device, waits for the processor included."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats + 1)]
    marks[0].record()
    for i in range(repeats):
        output = step.forward()
        marks[2 * i + 1].record()
        step.backward(output)
        del output
        marks[2 * i + 2].record()
    marks[-1].synchronize()
    spans = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    return sum(spans[::2]) / repeats, sum(spans[1::2]) / repeats


def peak(step: Step) -> float:
    """MiB beyond what was there before and the gradients that the step returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step.backward(step.forward())
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients if g is not None)
    return max(extra, 0) / MEBI


def host(step: Step) -> float:
    """Microseconds that the processor takes to issue a forward and a backward, while the device keeps up."""
    times = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step.backward(step.forward())
        times.append(time.perf_counter() - start)
    return sorted(times)[HOST_STEPS // 2] * 1e6


def measure(
    gpu: GpuCase, rates: dict[str, float], rounds: int, provenance: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """The record of one case, in the form of `benchmarks.runner`. Who is wrong, missing or too large is named."""
    case = gpu.case
    inputs = place(case.make_inputs(), gpu.dtype, gpu.wide)
    steps: dict[str, Step] = {}
    checked: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    for contender in case.contenders:
        name = contender.name
        try:
            checked[name] = check(gpu, contender)
            if not checked[name]["ok"]:
                continue
            step = step_of(gpu, contender, inputs)
            for _ in range(2):
                timed(step, 1)
            if case.memory:
                peaks[name] = peak(step)
            steps[name] = step
        except torch.OutOfMemoryError:
            checked[name] = {"ok": False, "error": "does not fit into the device's memory"}
        except Exception as error:  # a peer may fail in any way; it must not take the others with it
            checked[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        torch.cuda.empty_cache()
    repeats = {name: max(1, min(200, round(SAMPLE / sum(timed(step, 1))))) for name, step in steps.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in steps}
    names = list(steps)
    for turn in range(rounds):
        if turn >= 5 and time.monotonic() > deadline:
            break
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            steps[name].restore()
            forward, backward = timed(steps[name], repeats[name])
            times[name]["forward"].append(forward)
            times[name]["backward"].append(backward)
    count = len(next(iter(times.values()), {"forward": []})["forward"])
    floor = {"gemm": gpu.flops / rates["bfloat16"]} if gpu.flops else {"copy": gpu.bytes / rates["copy"]}
    times |= {name: {"forward": [seconds] * count, "backward": [0.0] * count} for name, seconds in floor.items()}
    return {
        "op": case.op, "shape": case.shape, "variant": case.variant, "dtype": str(gpu.dtype)[6:], "images": 0,
        "eager": list(case.eager), "floor": {"flops": gpu.flops, "bytes": gpu.bytes},
        "sources": {c.name: c.source for c in case.contenders}, "goals": [asdict(goal) for goal in case.goals],
        "host_goal": gpu.host, "memory_goal": gpu.most, "check": checked, "time": {"gpu": times}, "memory": peaks,
        "host": {name: host(step) for name, step in steps.items() if gpu.host is not None},
        "provenance": {**provenance, "rounds": count},
    }  # fmt: skip


def ours(record: dict[str, Any]) -> str | None:
    """What is wrong with ours, if anything is."""
    return record["check"].get(OURS, {}).get("error")
