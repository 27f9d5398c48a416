# SPDX-License-Identifier: Apache-2.0
"""What runs here: versions, libraries, instruction set, threads, devices, and what serves each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import sslkernels
from sslkernels import _library
from sslkernels.ops._registry import EVERYWHERE, OPS

LEVELS = ("baseline", "v3", "v4")  # x86-64 levels: SSE2, AVX2 with FMA, AVX-512


def gather() -> dict[str, Any]:
    """Everything that `python -m sslkernels info` prints, ready for JSON."""
    return {
        "versions": _versions(),
        "libraries": {device: _library_state(device) for device in _library.COMPILED},
        "instruction_set": {"level": _level(), "cap": os.environ.get("SSLKERNELS_CPU_LEVEL"), "cpu": _cpu_name()},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "devices": _devices(),
        "ops": {name: {device: serves(name, device) for device in _library.COMPILED} for name in sorted(OPS)},
    }


def serves(name: str, device: str) -> str:
    """Which implementation of the op serves tensors on the device."""
    if device == "cuda" and torch.version.cuda is None:
        return "unavailable"
    if name in _library.COMPILED[device]:
        return "compiled"
    if _library.has_kernel(name, device):
        return "torch" if device == "cpu" else "triton"
    return "torch" if name in EVERYWHERE else "reference"


def text(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = ["  ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)]
    for device, state in facts["libraries"].items():
        ending = f" (CUDA {state['runtime']}, driver {state['driver'] or 'none'})" if state.get("runtime") else ""
        lines.append(f"{device} library: {state['problem'] or state['path'] + ending}")
    isa, threads = facts["instruction_set"], facts["threads"]
    cap = f" (capped by SSLKERNELS_CPU_LEVEL={isa['cap']})" if isa["cap"] else ""
    lines.append(f"instruction set: {isa['level'] or 'that of torch'}{cap} on {isa['cpu']}")
    lines.append(f"threads: {threads['torch']} of {threads['cores']} cores")
    lines += [f"device: {device}" for device in facts["devices"]]
    width = max(map(len, facts["ops"]), default=0)
    lines += ["", f"{'op':{width}}  {'cpu':9}  cuda"]
    lines += [f"{name:{width}}  {by['cpu']:9}  {by['cuda']}" for name, by in facts["ops"].items()]
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)  # without importing it
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "sslkernels": sslkernels.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
    }


def _library_state(device: str) -> dict[str, Any]:
    problem = _library.PROBLEMS.get(device)
    state: dict[str, Any] = {"loaded": not problem, "path": str(_library.path(device)), "problem": problem}
    if device == "cuda" and not problem:
        state["runtime"], state["driver"] = _library.cuda_versions()
    return state


def _level() -> str | None:
    """The instruction set that the CPU kernels use; None without them."""
    op = getattr(torch.ops.sslkernels, "cpu_level", None)
    return LEVELS[op()] if op else None


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]
