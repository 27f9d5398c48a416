# SPDX-License-Identifier: Apache-2.0
"""What is measured on this machine, into one results file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import machine, memory
from benchmarks.runner import REGIMES, RESULTS, dump
from benchmarks.scaling.cases import LOSSES
from benchmarks.scaling.processes import launch
from benchmarks.scaling.traffic import sent

WORLD = 2  # that is timed: as many as there are cores
CHECKED = {"n": 48, "D": 24}
COUNTED = {"n": 6, "D": 64}
SHORTEST = 0.05  # seconds of a sample


class Shape(NamedTuple):
    loss: str
    n: int  # rows of a rank
    D: int

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.n}-{self.D}"


TIMED = (
    Shape("nt_xent", 512, 128),
    Shape("nt_xent", 1024, 512),
    Shape("clip_loss", 1024, 128),
    Shape("clip_loss", 2048, 512),
    Shape("siglip_loss", 2048, 512),
    Shape("barlow_twins_loss", 256, 2048),
)
WEIGHED = (Shape("nt_xent", 256, 1024), Shape("clip_loss", 512, 1024))  # 2 MiB of features travel from each rank
WORLDS = (1, 2, 4, 8)
Say = Callable[[str], None]


def path() -> Any:
    return RESULTS / f"scaling-{machine.describe()['name']}.json"


def times(shape: Shape, rounds: int) -> dict[str, Any]:
    loss = LOSSES[shape.loss]
    checked = launch(WORLD, {"job": "check", "loss": shape.loss, **CHECKED}, {})[0]
    sound = [name for name, found in checked.items() if found["ok"]]
    job = {"job": "time", **shape._asdict(), "names": sound, "rounds": rounds, "shortest": SHORTEST}
    before = os.getloadavg()[0]
    time = launch(WORLD, job, REGIMES["kept"])[0]
    return {
        **shape._asdict(), "check": checked, "time": time, "load": before,
        "sources": {name: contender.source for name, contender in loss.contenders().items()},
    }  # fmt: skip


def peaks(shape: Shape) -> dict[str, dict[str, float]]:
    """MiB by strategy and world; the highest of the ranks."""
    found: dict[str, dict[str, float]] = {}
    for name in LOSSES[shape.loss].contenders():
        for world in WORLDS:
            job = {"job": "memory", **shape._asdict(), "name": name}
            found.setdefault(name, {})[str(world)] = max(launch(world, job, memory.ENVIRONMENT))
    return found


def counts(loss: str) -> list[dict[str, Any]]:
    """Bytes that rank 0 sends, counted and by formula; and those of the comparison of what ranks bring."""
    rows = []
    for world in (2, 3, 4):
        found = launch(world, {"job": "count", "loss": loss, "check": "first", **COUNTED}, {})[0]
        for strategy, halves in found.items():
            rows.append({
                "loss": loss, "world": world, "strategy": strategy,
                "counted": [round(half) for half, _ in halves], "compared": halves[0][1],
                "formula": [round(x) for x in sent(loss, [COUNTED["n"]] * world, 0, strategy, COUNTED["D"])],
            })  # fmt: skip
    return rows


def run(rounds: int, what: list[str], losses: list[str], say: Say = print) -> dict[str, Any]:
    """what: of "links", "bytes", "memory" and "time". Replaces what the file has of them."""
    file = path()
    results = json.loads(file.read_text()) if file.exists() else {"cases": {}, "memory": {}, "bytes": {}}
    results["machine"] = machine.describe()
    results["provenance"] = {**machine.provenance(1, what, "benchmarks.scaling"), "rounds": rounds}

    def keep() -> None:
        file.write_text(dump(results))

    if "links" in what:
        results |= launch(WORLD, {"job": "links", "rounds": rounds}, REGIMES["kept"])[0]
        keep()
    if "bytes" in what:
        for loss in losses:
            say(f"bytes of {loss}")
            results["bytes"][loss] = counts(loss)
            keep()
    if "memory" in what:
        for shape in WEIGHED:
            if shape.loss in losses:
                say(f"memory of {shape.name}")
                results["memory"][shape.name] = {**shape._asdict(), "peaks": peaks(shape)}
                keep()
    if "time" in what:
        for shape in TIMED:
            if shape.loss in losses:
                say(f"time of {shape.name}")
                results["cases"][shape.name] = times(shape, rounds)
                keep()
    return results
