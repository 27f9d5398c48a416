# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a job: processes of their own, in a gloo group, with one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.runner import JobError

PATIENCE = 900  # seconds


def launch(world: int, job: dict[str, Any], environment: dict[str, str]) -> Any:
    """What the ranks of `benchmarks.scaling.worker` return, rank 0 first."""
    dropped = ("MALLOC_", "GLIBC_TUNABLES", "OMP_", "MKL_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            told = json.dumps({**job, "rank": rank, "world": world, "store": f"{folder}/store"})
            with Path(folder, f"{rank}.err").open("w") as errors:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.scaling.worker", told],
                        cwd=machine.ROOT,
                        env={**inherited, **environment},
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
        try:
            said = [process.communicate(timeout=PATIENCE)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        for rank, process in enumerate(ranks):
            if process.returncode:
                text = Path(folder, f"{rank}.err").read_text().strip()[-800:]
                raise JobError(f"job {job['job']}: rank {rank} of {world} failed ({process.returncode}): {text}")
    return [json.loads(lines.splitlines()[-1]) for lines in said]
