# SPDX-License-Identifier: Apache-2.0
"""What `cached_step` saves and costs: `python -m benchmarks.cached`, a SimCLR step of a small transformer on the CPU.

Peak memory and processor time of a whole forward and backward, each form in a process of its own. Writes
benchmarks/results/cached-step.json and the table in docs/large_batches.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, memory, report
from sslkernels import cached_step
from sslkernels.losses import nt_xent
from sslkernels.nn import VisionTransformer

PAIRS, SIZE, REPEATS = 128, 64, 2
MICRO_BATCHES = (None, 64, 32, 8)  # None: one graph of the whole batch


def measure(micro_batch: int | None) -> dict[str, float]:
    """Peak MiB beyond inputs and gradients, processor seconds of a step, and the gradient's norm."""
    torch.manual_seed(0)
    model = VisionTransformer(patch_size=8, embed_dim=96, depth=6)
    views = torch.rand(2, PAIRS, 3, SIZE, SIZE).unbind()

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return model(a), model(b)

    def step(rows: int = PAIRS) -> list[Tensor]:
        model.zero_grad()
        parts = [view[:rows] for view in views]
        if micro_batch is None:
            nt_xent(*both(*parts), 0.1).backward()
        else:
            cached_step(both, nt_xent_of, *parts, micro_batch=micro_batch)
        return [p.grad for p in model.parameters() if p.grad is not None]

    def nt_xent_of(a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a, b, 0.1)

    step(8)
    peak = memory.peak_mib(step)
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        gradients = step()
        seconds.append(time.process_time() - started)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    return {"peak_mib": peak, "seconds": min(seconds), "norm": norm}


def in_a_process(micro_batch: int | None) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cached", "--measure", str(micro_batch or 0)]
    environment = {**os.environ, **memory.ENVIRONMENT}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def table(results: dict[str, Any]) -> str:
    whole = results["forms"]["0"]
    rows = []
    for name, form in results["forms"].items():
        label = "one graph" if name == "0" else f"`micro_batch={name}`"
        shares = [f"{form[key] / whole[key]:.2f}x" for key in ("peak_mib", "seconds")]
        rows.append([label, f"{form['peak_mib']:,.0f} MiB", shares[0], f"{form['seconds']:.2f} s", shares[1]])
    header = [f"step of {PAIRS} pairs", "peak memory", "of one graph", "processor time", "of one graph"]
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cached", description=__doc__)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure is not None:
        print(json.dumps(measure(options.measure or None)))
        return
    forms = {str(size or 0): in_a_process(size) for size in MICRO_BATCHES}
    described, made = machine.describe(), machine.provenance(1, [], "benchmarks.cached")
    results = {"machine": described, "provenance": made, "pairs": PAIRS, "image": SIZE, "forms": forms}
    (machine.ROOT / "benchmarks" / "results" / "cached-step.json").write_text(json.dumps(results, indent=1) + "\n")
    line = f"{described['cpu']}, one thread, torch {made['torch']}."
    report.insert(machine.ROOT / "docs" / "large_batches.md", "cached", f"{table(results)}\n\n{line}")
    print(table(results))


if __name__ == "__main__":
    main()
