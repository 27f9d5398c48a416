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
        "triton": _problem("triton"),
        "instruction_set": {"level": _level(), "cap": os.environ.get("SSLKERNELS_CPU_LEVEL"), "cpu": _cpu_name()},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "devices": _devices(),
        "ops": {name: {device: serves(name, device) for device in _library.COMPILED} for name in sorted(OPS)},
    }


def serves(name: str, device: str) -> str:
    """Which implementation of the op serves tensors on the device."""
    if device == "cuda" and torch.version.cuda is None and torch.version.hip is None:
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
        lines.append(f"{device} library: {_sentence(state) or state['path']}")
        if state.get("runtime"):
            architectures = ", ".join(f"sm_{name}" for name in state["architectures"])
            lines[-1] += f" (CUDA {state['runtime']} for {architectures}; driver: {state['driver'] or 'none'})"
    lines.append(f"triton kernels: {_sentence(facts['triton']) or 'ready'}")
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
    problem = _problem(device)
    state: dict[str, Any] = {"loaded": problem["problem"] is None, "path": str(_library.path(device)), **problem}
    if device == "cuda" and _library.path(device).is_file():
        (runtime, architectures), driver = _library.built_for(), _library.driver_version()
        state["runtime"], state["architectures"] = _library.version_text(runtime), [a // 10 for a in architectures]
        state["driver"] = _library.version_text(driver) if driver else None
    return state


def _problem(name: str) -> dict[str, str | None]:
    reason, remedy = _library.PROBLEMS.get(name) or (None, None)
    return {"problem": reason, "remedy": remedy or None}


def _sentence(state: dict[str, Any]) -> str:
    return ". ".join(filter(None, (state["problem"], state["remedy"])))


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
    return ["cpu", *(_gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))]


def _gpu(device: torch.device) -> str:
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    missing = "" if _library.runs_triton(device) else ", too old for the Triton kernels"
    built = _library.built_for()[1] if _library.path("cuda").is_file() and torch.version.cuda else []
    if built and min(built) > 100 * int(capability.split(".")[0]) + 10 * int(capability.split(".")[1]):
        missing += ", older than any that the CUDA library was built for: build again with SSLKERNELS_CUDA=0"
    return f"{device} {torch.cuda.get_device_name(device)} (compute capability {capability}{missing})"
