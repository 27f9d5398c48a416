# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.stall`: how far a 16-bit moving average comes, and where rounding to nearest stops it.

Targets of 0 follow sources of 1 for 3,000 steps at momentum 0.999, at the end of which 1 - 0.999^3000 = 0.95 is exact.
Writes ema-stall.json and its picture beside the other results, and the table in docs/benchmarks.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, report
from benchmarks.contenders import ema as contenders
from benchmarks.runner import RESULTS, dump
from sslkernels.ops import ema_update_

MOMENTUM, STEPS, EVERY, VALUES = 0.999, 3000, 25, 4096
Update = Callable[[list[Tensor], list[Tensor], float], Any]


def stochastic(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    ema_update_(targets, sources, momentum, stochastic_rounding=True)


# name: dtype of the targets (the sources are 16-bit in all), update
FORMS: dict[str, tuple[torch.dtype, Update]] = {
    "bfloat16, torch._foreach_lerp_": (torch.bfloat16, contenders.foreach_lerp),
    "bfloat16, lightly's multiply and add": (torch.bfloat16, contenders.lightly),
    "float16, torch._foreach_lerp_": (torch.float16, contenders.foreach_lerp),
    "bfloat16, timm's stochastic rounding": (torch.bfloat16, contenders.timm),
    "bfloat16, ema_update_ with stochastic rounding": (torch.bfloat16, stochastic),
    "float16, ema_update_ with stochastic rounding": (torch.float16, stochastic),
    "float32, ema_update_ from bfloat16 sources": (torch.float32, ema_update_),
}


def exact(step: int) -> float:
    return 1 - MOMENTUM**step


def follow(dtype: torch.dtype, update: Update) -> dict[str, list[float]]:
    """Mean over the values at every 25th step, and their standard deviation at the last."""
    torch.manual_seed(0)
    targets = [torch.zeros(VALUES, dtype=dtype)]
    sources = [torch.ones(VALUES, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)]
    means = [0.0]
    for step in range(1, STEPS + 1):
        update(targets, sources, MOMENTUM)
        if step % EVERY == 0:
            means.append(targets[0].double().mean().item())
    return {"means": means, "deviation": [targets[0].double().std().item()]}


def table(curves: dict[str, dict[str, list[float]]]) -> str:
    header = [f"targets, update: after {STEPS:,} steps", "mean", "standard deviation of one value", "exact"]
    rows = [
        [name, f"{curve['means'][-1]:.4f}", f"{curve['deviation'][0]:.4f}", f"{exact(STEPS):.4f}"]
        for name, curve in curves.items()
    ]
    return report.table(header, rows)


def draw(curves: dict[str, dict[str, list[float]]], path: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = range(0, STEPS + 1, EVERY)
    figure, axis = plt.subplots(figsize=(8, 4.2))
    axis.plot(steps, [exact(s) for s in steps], color="#bbb", linewidth=5, label="exact")
    for name, curve in curves.items():
        axis.plot(steps, curve["means"], label=name, linestyle="-" if "ema_update_" in name else "--", linewidth=1.3)
    axis.set_xlabel(f"steps at momentum {MOMENTUM}")
    axis.set_ylabel("average of targets that follow 1 from 0")
    axis.legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    curves = {name: follow(*form) for name, form in FORMS.items()}
    facts = {"momentum": MOMENTUM, "steps": STEPS, "every": EVERY, "values": VALUES, "exact": exact(STEPS)}
    (RESULTS / "ema-stall.json").write_text(dump({**facts, "curves": curves}))
    draw(curves, RESULTS / "ema-stall.png")
    made = f"{table(curves)}\n\n![moving averages in 16 bits](../benchmarks/results/ema-stall.png)"
    report.insert(machine.ROOT / "docs" / "benchmarks.md", "stall", made)
    print(json.dumps({name: round(curve["means"][-1], 4) for name, curve in curves.items()}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
