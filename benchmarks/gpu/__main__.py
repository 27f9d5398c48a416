# SPDX-License-Identifier: Apache-2.0
"""Builds for the GPU that is here, runs its tests, times every case, and prints the table of goals last.

usage: python -m benchmarks.gpu [--minutes 8.5] [--no-build] [--no-tests] [--case NAME ...] [--docs]

Needs a torch with CUDA, nvcc, pytest and hypothesis; the picture needs matplotlib. Results go to
`benchmarks/results/gpu-DEVICE.{json,md,png}`, or into the folder that --out names. `--docs` measures nothing: it puts
the table into docs/gpu.md, from the results that are there or, without any, as not measured yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.table import goals
from benchmarks.report import insert, progress, times_table
from benchmarks.runner import RESULTS, dump

BUILD, TESTS = 120, 240  # seconds at most


def device() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    slug = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
    return {
        "name": slug, "cpu": found.name, "cores": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}", "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda, "processor": machine.describe()["cpu"],
    }  # fmt: skip


def run(command: list[str], limit: float, **environment: str) -> int:
    print("+", " ".join(command), flush=True)
    try:
        return subprocess.run(command, cwd=machine.ROOT, env=os.environ | environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit:.0f} s", flush=True)
        return 124


def build() -> int:
    major, minor = torch.cuda.get_device_capability()
    (machine.ROOT / ".venv/.built").unlink(missing_ok=True)  # make's: what is built here serves this GPU alone
    choices = {"SSLKERNELS_CUDA": "1", "SSLKERNELS_CUDA_ARCHITECTURES": f"{major}{minor}"}
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD, **choices)


def test(limit: float) -> dict[str, int]:
    """Most in several processes where pytest-xdist is there, since kernels compile; what needs the memory, alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    spread = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    large = "tests/gpu/test_large.py"
    parts = {
        "tests": [*command, *spread, "tests/gpu", "tests/ops", "tests/test_ema_module.py", f"--ignore={large}"],
        "large": [*command, large],
    }
    start = time.monotonic()
    return {name: run(part, limit - (time.monotonic() - start)) for name, part in parts.items()}


def publish(results: dict[str, Any], folder: Path) -> None:
    path = folder / f"gpu-{results['machine']['name']}.json"
    path.write_text(dump(results))
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        from benchmarks.plot import draw

        draw(results, path.with_suffix(".png"), regime="gpu")
    facts, rates = results["machine"], results["ceilings"]
    made = next(iter(results["cases"].values()))["provenance"]
    head = (
        f"{facts['cpu']}, CUDA {facts['cuda']}, torch {made['torch']}, {made['date']}, commit {made['commit'][:10]}. "
        f"A copy moves {rates['copy'] / 1e12:.2f} TB/s (read and written), a bfloat16 product runs at "
        f"{rates['bfloat16'] / 1e12:.0f} TFLOP/s. Tests: {results['tests'] or 'not run'} (exit codes)."
    )
    left = [
        f"- {title}: {name}: {found['error']}"
        for title, record in results["cases"].items()
        for name, found in record["check"].items()
        if not found["ok"]
    ]
    parts = [head, *[f"![speed and memory]({path.stem}.png)"] * drawn, goals(results), times_table(results, "gpu")]
    parts += ["Left out:\n\n" + "\n".join(left)] if left else []
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def documents() -> None:
    import json

    found = sorted(RESULTS.glob("gpu-*.json"))
    results = json.loads(found[-1].read_text()) if found else None
    text = goals(results)
    insert(machine.ROOT / "docs/gpu.md", "goals", f"{results['machine']['cpu']}.\n\n{text}" if results else text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--case", action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true")
    chosen = parser.parse_args()
    if chosen.docs:
        documents()
        return 0
    if not torch.cuda.is_available():
        print(f"no CUDA device is here (torch {torch.__version__}); the goals:\n\n{goals(None)}")
        return 1
    start = time.monotonic()
    end = start + 60 * chosen.minutes
    if not chosen.no_build and (status := build()):
        print(f"the build failed; nothing was measured:\n\n{goals(None)}")
        return status
    tests = {} if chosen.no_tests else test(TESTS)
    from benchmarks.gpu import measure  # after the build, so that the compiled kernels are loaded

    results: dict[str, Any] = {"family": "GPU", "machine": device(), "ceilings": measure.ceilings(), "tests": tests}
    results["cases"] = {}
    arguments = sys.argv[1:]
    provenance = machine.provenance(torch.get_num_threads(), arguments, "benchmarks.gpu")
    cases = [case for case in CASES if not chosen.case or case.name in chosen.case]
    for number, case in enumerate(cases, 1):
        left = end - time.monotonic()
        if left < 10:
            print(f"no time left for {', '.join(c.name for c in cases[number - 1 :])}", flush=True)
            break
        print(f"[{number}/{len(cases)}] {case.name}, {left:.0f} s left", flush=True)
        deadline = time.monotonic() + left / (len(cases) - number + 1)
        record = measure.measure(case, results["ceilings"], chosen.rounds, provenance, deadline)
        results["cases"][case.name] = record
        for name, found in record["check"].items():
            if not found["ok"]:
                print(f"  {name} is left out: {found['error']}")
        for line in progress(record):
            print(f"  {line}")
        chosen.out.mkdir(parents=True, exist_ok=True)
        publish(results, chosen.out)
    wrong = [name for name, record in results["cases"].items() if measure.ours(record)]
    print(f"\n{time.monotonic() - start:.0f} s. Tests: {tests or 'not run'}. Wrong: {wrong or 'none'}.\n")
    print(goals(results))
    return int(bool(wrong) or any(tests.values()))


if __name__ == "__main__":
    sys.exit(main())
