# SPDX-License-Identifier: Apache-2.0
"""The table of the GPU's goals, measured or not."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cases import CASES, GpuCase
from benchmarks.report import duration, mark, mebibytes, table, title
from benchmarks.stats import OURS, Verdict, judge, seconds, summary

NOT_YET = "not measured yet"


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """Of the goals in time and memory against others, and of the two that stand alone."""
    found = [judge(record, goal, "gpu") for goal in record["goals"]]
    if record["host_goal"] is not None:
        took = record["host"].get(OURS)
        # forward and backward are an op each
        met = None if took is None else took / 2 <= record["host_goal"]
        found.append(Verdict(f"≤ {record['host_goal']:g} us of the processor an op", f"{(took or 0) / 2:.0f} us", met))
    if record["memory_goal"] is not None:
        took = record["memory"].get(OURS)
        met = None if took is None else took <= record["memory_goal"]
        found.append(Verdict(f"≤ {record['memory_goal']:,.0f} MiB beyond inputs and gradients", mebibytes(took), met))
    return found


def unmeasured(gpu: GpuCase) -> dict[str, Any]:
    goals = [vars(goal) for goal in gpu.case.goals]
    return {
        "op": gpu.case.op, "shape": gpu.case.shape, "variant": gpu.case.variant, "eager": list(gpu.case.eager),
        "goals": goals, "host_goal": gpu.host, "memory_goal": gpu.most, "time": {}, "memory": {}, "host": {},
    }  # fmt: skip


def goals(results: dict[str, Any] | None) -> str:
    """Every case with its goals; without results each says that it is not measured."""
    records = (results or {"cases": {}})["cases"]
    rows = []
    for gpu in CASES:
        record = records.get(gpu.name) or unmeasured(gpu)
        times = record["time"].get("gpu", {})
        took = duration(summary(seconds(times, OURS)).median) if OURS in times else NOT_YET
        for number, verdict in enumerate(verdicts(record)):
            known = verdict.met is not None
            cells = [title(record), took] if number == 0 else ["", ""]
            rows.append([*cells, verdict.goal, verdict.got if known else NOT_YET, mark(verdict) if known else "-"])
    return table(["case", "ours, forward + backward", "goal", "measured", ""], rows, right=1)
