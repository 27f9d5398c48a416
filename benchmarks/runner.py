# SPDX-License-Identifier: Apache-2.0
"""Measures cases by jobs in processes of their own and keeps the records in one JSON file per machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, memory
from benchmarks.case import Case
from benchmarks.cases import FAMILIES
from benchmarks.report import progress
from benchmarks.worker import compiled

# glibc's malloc gives large blocks back to the kernel, which then has to fault them in again at every step. "kept"
# never gives back, which is what a caching allocator does.
REGIMES = {
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
    "default": {},
}
FEW = 3  # rounds of a slow case where no goal is judged: under default malloc, or anywhere if it has none
FORM = 1  # of the results file; one of another form is measured anew
RESULTS = machine.ROOT / "benchmarks" / "results"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    rounds: int = 15
    threads: int = 2
    regimes: tuple[str, ...] = ("kept", "default")
    memory: bool = True
    compile: bool = False
    shortest: float = 0.02  # seconds a sample lasts at least


class JobError(RuntimeError):
    """A measuring process failed; the message ends with what it said."""


def launch(job: dict[str, Any], environment: dict[str, str]) -> Any:
    """Run one job of `benchmarks.worker` in a process of its own and return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    # A thread count in the environment would overrule --threads.
    inherited = {k: v for k, v in inherited.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", json.dumps(job)],
        cwd=machine.ROOT, env={**inherited, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise JobError(
            f"job {job['job']} of {job.get('case')} failed ({done.returncode}): {done.stderr.strip()[-800:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, options: Options, provenance: dict[str, Any], say: Say = print) -> dict[str, Any]:
    """The record of one case. A contender that is wrong or missing is named, and is not timed."""
    declared = compiled(case) if options.compile else case
    names = [c.name for c in declared.contenders]
    job = {"case": case.name, "shape": case.shape, "threads": options.threads, "compile": options.compile}
    checked = launch({**job, "job": "check", "names": names}, {})
    for name, result in checked.items():
        if not result["ok"]:
            say(f"  {name} is left out: {result['error']}")
    sound = [name for name in names if checked[name]["ok"]]
    record = {
        "op": case.op,
        "shape": case.shape,
        "variant": case.variant,
        "images": round(case.shape.get("N", 0) * case.images_per_row),
        "eager": list(case.eager),
        "floor": {case.floor.name: case.floor.describe(case.shape)} if case.floor else {},
        "sources": {c.name: c.source for c in case.contenders},
        "goals": [asdict(goal) for goal in case.goals],
        "check": checked,
        "time": {},
        "memory": {},
        "provenance": {**provenance, "rounds": options.rounds},
    }
    for regime in options.regimes:
        judged = bool(case.goals) and regime == "kept"
        rounds = min(options.rounds, FEW) if case.slow and not judged else options.rounds
        timing = {**job, "job": "time", "names": [*sound, *case.floors()], "rounds": rounds}
        record["time"][regime] = launch({**timing, "shortest": options.shortest}, REGIMES[regime])
    if options.memory and case.memory:
        for name in sound:
            record["memory"][name] = launch({**job, "job": "memory", "name": name}, memory.ENVIRONMENT)
    return record


def results_path(family: str, suffix: str = "") -> Path:
    return RESULTS / f"{family}-{machine.describe()['name']}{suffix}.json"


def load(path: Path, family: str) -> dict[str, Any]:
    """The results file, or a new one if there is none of this form: cases measured again replace their record."""
    new = {"form": FORM, "family": family, "machine": machine.describe(), "encoder": None, "cases": {}}
    stored = json.loads(path.read_text()) if path.exists() else new
    return stored if stored.get("form") == FORM and stored["machine"] == new["machine"] else new


def rounded(value: Any) -> Any:
    """Four significant digits are more than a timing has; they keep the file small and its diffs readable."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def dump(results: dict[str, Any]) -> str:
    """JSON with one line for each list of samples."""
    text = json.dumps(rounded(results), indent=1)
    return re.sub(r"\[\n([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def run(family: str, cases: list[Case], options: Options, arguments: list[str], path: Path, say: Say = print) -> None:
    """Measure `cases`, writing the file after each one."""
    results = load(path, family)
    if any(case.images_per_row for case in cases):
        job = {"job": "encoder", "threads": options.threads, "rounds": options.rounds}
        results["encoder"] = launch(job, REGIMES["kept"])
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.name}")
        record = measure(case, options, machine.provenance(options.threads, arguments), say)
        measured = {**results["cases"], case.name: record}
        # Declared order; what is no longer declared goes.
        results["cases"] = {c.name: measured[c.name] for c in FAMILIES[family] if c.name in measured}
        path.write_text(dump(results))
        for line in progress(record):
            say(f"  {line}")
