# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    # aarch64 names no model; its implementer and part number identify the core.
    for key in ("model name", "Model", "CPU part"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return found.group(1).strip()
    return platform.machine()


def cache_kib(level: int) -> int | None:
    """Size of one unified cache of this level next to CPU 0."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() == "Unified":
                return int((index / "size").read_text().strip().removesuffix("K"))
        except (OSError, ValueError):
            continue
    return None


def describe() -> dict[str, Any]:
    model, cores = cpu_model(), os.cpu_count() or 1
    slug = re.sub(r"\((r|tm|c)\)|cpu|@.*", " ", model, flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    return {
        "name": f"{slug}-{cores}-core",
        "cpu": model,
        "cores": cores,
        "l2_kib": cache_kib(2),
        "l3_kib": cache_kib(3),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(threads: int, arguments: list[str], module: str = "benchmarks") -> dict[str, Any]:
    """Goes into every case's record, so that cases measured at different commits can share a file."""
    import torch

    from sslkernels import info

    facts = info.gather()
    return {
        "commit": git("rev-parse", "HEAD"),
        # Results and the README are written by the benchmark itself.
        "dirty": bool(git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!README.md")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "instruction_set": facts["instruction_set"]["level"],
        "without_kernel": sorted(op for op, served in facts["ops"].items() if served["cpu"] == "reference"),
        "threads": threads,
        "command": " ".join([f"python -m {module}", *arguments]),
    }
