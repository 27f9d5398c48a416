# SPDX-License-Identifier: Apache-2.0
"""One job in a process of its own: `python -m benchmarks.worker '{"job": "time", ...}'` prints one line of JSON.

A job has a process because the allocator's regime is fixed when a process starts and because peak memory must not
see what another contender left behind.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import memory
from benchmarks.case import (
    COTANGENT,
    Case,
    Contender,
    ContenderStep,
    Inputs,
    Step,
    differentiable,
    held,
    leaves,
    recast,
    tensors,
)  # fmt: skip
from benchmarks.cases import find
from benchmarks.stats import OURS

FRESH = 1e9  # bytes of batches, of which some cases read a quarter; a copy of 150 MB runs at the speed of memory
MOST_BATCHES = 128
WARM = 0.5  # seconds; a step that takes longer is warm after one


def check(case: Case, names: list[str]) -> dict[str, Any]:
    """The gate to being timed: what each contender computes, judged by the case's formula or by what must hold."""
    inputs = case.make_inputs()
    expected = exact(case, case.make_inputs(torch.float64)) if case.formula else None
    report = {}
    for name in names:
        contender = case.contender(name)
        try:
            step = ContenderStep(contender, inputs, case.changes, attached=True)
            report[name] = compare(contender, step, *expected) if expected else examine(case, contender, step, inputs)
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            report[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return report


def exact(case: Case, inputs: Inputs) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """The formula's result and gradients, for inputs of float64."""
    cotangent = inputs.pop(COTANGENT, None)
    value = case.formula(**inputs)
    wanted = leaves(inputs)
    gradients = torch.autograd.grad(differentiable(value), wanted, cotangent) if wanted else ()
    return [x.detach() for x in tensors(value)], gradients


def compare(
    contender: Contender, step: ContenderStep, values: list[torch.Tensor], gradients: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    output = step.forward()
    got = step.backward(output)
    found = [x.detach() for x in tensors(contender.result(output))]
    value_error = worst(relative_error(f, e) for f, e in zip(found, values, strict=True))
    pairs = zip(got, gradients, step.trained, strict=True)
    gradient_error = worst(relative_error(g, e) for g, e, trained in pairs if trained)
    # Written so that a NaN fails.
    ok = value_error <= contender.limit and gradient_error <= contender.limit
    report: dict[str, Any] = {"ok": ok, "value_error": value_error, "gradient_error": gradient_error}
    if not ok:
        report["error"] = f"value error {value_error:.1e}, gradient error {gradient_error:.1e}"
    return report


def examine(case: Case, contender: Contender, step: ContenderStep, inputs: Inputs) -> dict[str, Any]:
    wrong = case.holds(contender.result(step.forward()), **inputs)
    return {"ok": False, "error": wrong} if wrong else {"ok": True}


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    if got.shape != exact.shape:
        return math.inf
    return ((got.to_dense().double() - exact).norm() / exact.norm()).item()


def worst(errors: Iterable[float]) -> float:
    """The largest, 0 of none; a NaN is above all, where max() keeps it only if it comes first."""
    return max(errors, key=lambda error: (math.isnan(error), error), default=0.0)


def timed(step: Step, repeats: int) -> tuple[float, float]:
    """Seconds of one forward and of one backward, averaged over `repeats` steps."""
    forward = backward = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        loss = step.forward()
        middle = time.perf_counter()
        gradients = step.backward(loss)
        end = time.perf_counter()
        forward, backward = forward + middle - start, backward + end - middle
        del loss, gradients
    return forward / repeats, backward / repeats


def interleave(steps: dict[str, Step], rounds: int, shortest: float) -> dict[str, dict[str, list[float]]]:
    """`rounds` samples of each contender, taken in turn; a sample repeats steps until it lasts `shortest` seconds."""
    repeats = {}
    for name, step in steps.items():
        first = sum(timed(step, 1))
        if first < WARM:
            timed(step, 1)
            first = sum(timed(step, 1))
        repeats[name] = max(1, math.ceil(shortest / first))
    samples: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in steps}
    names = list(steps)
    for turn in range(rounds):
        first = turn % len(names)  # whoever comes first follows another contender each time
        for name in names[first:] + names[:first]:
            steps[name].restore()
            forward, backward = timed(steps[name], repeats[name])
            samples[name]["forward"].append(forward)
            samples[name]["backward"].append(backward)
    return samples


def batches(case: Case) -> list[Inputs]:
    """The inputs or, of a case that wants fresh ones, so many copies that the last has left the caches."""
    inputs = case.make_inputs()
    size = memory.tensor_bytes(x for value in inputs.values() for x in held(value))
    copies = min(math.ceil(FRESH / size), MOST_BATCHES) - 1 if case.fresh else 0
    return [inputs, *({name: recast(value, None) for name, value in inputs.items()} for _ in range(copies))]


def peak(case: Case, name: str) -> float:
    """A tiny step of the same kind and the floor first: code, threads and the packing buffers that BLAS keeps for
    good (7 MiB with MKL) are there already, as they are in training."""
    inputs = case.make_inputs()
    tiny = case.tiny()
    for warm in (tiny.step(name, tiny.make_inputs()), *(case.step(floor, inputs) for floor in case.floors())):
        warm.backward(warm.forward())
    del warm
    step = case.step(name, inputs)
    return memory.peak_mib(lambda: step.backward(step.forward()))


def compiled(case: Case) -> Case:
    """The case with a `torch.compile` of every contender but ours beside the contender itself."""
    plain = [c for c in case.contenders if c.name != OURS and not c.compile]
    have = {c.name for c in case.contenders}
    more = tuple(c.compiled() for c in plain if c.compiled().name not in have)
    return replace(case, contenders=case.contenders + more)


def run(job: dict[str, Any]) -> Any:
    torch.set_num_threads(job["threads"])
    if job["job"] == "encoder":
        from benchmarks.encoder import NAME, seconds_per_image

        return {"name": NAME, "seconds_per_image": seconds_per_image(job["rounds"])}
    case = find(job["case"]).sized(**job.get("shape", {}))
    if job.get("compile"):
        case = compiled(case)
    if job["job"] == "check":
        return check(case, job["names"])
    if job["job"] == "memory":
        return peak(case, job["name"])
    if job["job"] == "time":
        made = batches(case)
        return interleave({name: case.step(name, *made) for name in job["names"]}, job["rounds"], job["shortest"])
    raise ValueError(f"job: expected check, time, memory or encoder, got {job['job']!r}")


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
