# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, remembers why one is missing, and announces a fallback once."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "lib"
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."

PROBLEMS: dict[str, str] = {}
"""Device type -> why its library is not loaded. A device that is not in here has its library."""

COMPILED: dict[str, set[str]] = {"cpu": set(), "cuda": set()}
"""Device type -> the ops that the compiled library of that device serves."""

_announced: set[str] = set()


def load() -> None:
    """Load the library of each device, where there is one that can run here."""
    for device, problem in (("cpu", ""), ("cuda", _cuda_problem())):
        path = FOLDER / f"libsslkernels_{device}.so"
        if not problem and not path.is_file():
            problem = f"{path.name} was not built when sslkernels was installed"
        if not problem:
            try:
                before = _served(device)
                torch.ops.load_library(path)
                COMPILED[device] = _served(device) - before
                continue
            except OSError as error:
                problem = f"{path.name} cannot be loaded: {error}"
        PROBLEMS[device] = problem


def warn_fallback(device: str) -> None:
    """Warn, once for each device type, that the reference serves it, why, and what to do."""
    if device in _announced or torch.compiler.is_compiling():
        return
    _announced.add(device)
    warnings.warn(f"sslkernels: {_remedy(device)}", RuntimeWarning, stacklevel=4)


def _remedy(device: str) -> str:
    slow = f"the plain PyTorch reference serves {device} tensors, which is slower and takes more memory"
    if device not in COMPILED:
        return f"there are no kernels for {device} devices: {slow}."
    if device not in PROBLEMS:
        return f"an op has no compiled kernel for {device} yet: {slow}. `python -m sslkernels info` lists them."
    needs = "a C++ compiler (apt-get install g++)" if device == "cpu" else "the CUDA toolkit (nvcc)"
    return f"{PROBLEMS[device]}, so {slow}. With {needs}, run in the source folder: {BUILD}"


def _cuda_problem() -> str:
    """Why the CUDA library cannot serve this torch and driver; empty if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return ""


def _served(device: str) -> set[str]:
    """The ops that have a kernel of their own under the dispatch key of `device`."""
    from sslkernels.ops._registry import OPS

    key = getattr(torch._C.DispatchKey, device.upper())
    return {name for name in OPS if getattr(torch.ops.sslkernels, name).default.has_kernel_for_dispatch_key(key)}
