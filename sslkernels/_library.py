# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, remembers why one is missing, and announces a fallback once."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "lib"
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
TOOLS = {"cpu": "a C++ compiler (apt-get install g++)", "cuda": "the CUDA toolkit (nvcc)"}
DRIVERS = {12: 525, 13: 580}  # CUDA's major version -> NVIDIA's first driver for it
TRITON_CAPABILITY = (8, 0)


class Problem(NamedTuple):
    """Why something does not serve, and what a user can do about it."""

    reason: str
    remedy: str = ""


# "cpu", "cuda" (the compiled libraries) and "triton": what is in the way of each; one that is not in here serves.
PROBLEMS: dict[str, Problem] = {}
# Device type -> the ops that its compiled library serves.
COMPILED: dict[str, set[str]] = {"cpu": set(), "cuda": set()}

_announced: set[str] = set()


def load() -> None:
    """Load the library of each device where it can run, and Triton for the rest; the ops must be defined by now."""
    for device in COMPILED:
        if problem := _load(device):
            PROBLEMS[device] = problem
    if problem := _load_triton():
        PROBLEMS["triton"] = problem


def path(device: str) -> Path:
    return FOLDER / f"libsslkernels_{device}.so"


def has_kernel(name: str, device: str) -> bool:
    """Whether the op has a kernel of its own for the device, compiled or not."""
    key = getattr(torch._C.DispatchKey, device.upper())
    return getattr(torch.ops.sslkernels, name).default.has_kernel_for_dispatch_key(key)


def built_for() -> tuple[int, list[int]]:
    """CUDA version (13020 is 13.2) and architectures (900 is sm_90) of the CUDA library, which is not loaded for it."""
    found = re.search(rb"sslkernels: CUDA (\d+) for ([\d,]+)", path("cuda").read_bytes())
    return (int(found[1]), [int(text) for text in found[2].split(b",")]) if found else (0, [])


def driver_version() -> int:
    """The newest CUDA that the NVIDIA driver knows; 0 without a driver. CUDA is not initialised, so one may fork."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def warn_fallback(name: str, arguments: Sequence[Any]) -> None:
    """Warn, once for each reason, that the reference serves the op, why, and what to do."""
    if torch.compiler.is_compiling():
        return
    tensors = _tensors(arguments)
    device = tensors[0].device.type if tensors else "cpu"
    reason, remedy = _problem(name, device, tensors)
    slower = f"the plain PyTorch reference serves {device} tensors, slower and with more memory"
    message = f"sslkernels: {reason}: {slower}. {remedy}".rstrip()
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _problem(name: str, device: str, tensors: list[torch.Tensor]) -> Problem:
    """Why the op has no kernel for these tensors."""
    from sslkernels.triton import KERNELS

    if device not in COMPILED:
        return Problem(f"there are no kernels for {device} devices")
    if device == "cuda" and name in KERNELS:
        if "triton" in PROBLEMS:
            return PROBLEMS["triton"]
        if not runs_triton(tensors[0].device):
            needed = ".".join(map(str, TRITON_CAPABILITY))
            return Problem(
                f"{tensors[0].device} is older than compute capability {needed}, which Triton's kernels need"
            )
        if _any_float64(KERNELS[name], tensors):
            return Problem("the GPU's kernels take float32, bfloat16 and float16, not float64")
    listed = "`python -m sslkernels info` lists what serves each op."
    return PROBLEMS.get(device) or Problem(f"an op has no kernel for {device} yet", listed)


def _load(device: str) -> Problem | None:
    """Load one library; what is in the way, if anything is."""
    from sslkernels.ops._registry import OPS  # which imports this module

    if problem := _obstacle(device):
        return problem
    before = {name for name in OPS if has_kernel(name, device)}
    try:
        torch.ops.load_library(path(device))
    except OSError as error:
        return Problem(f"{path(device).name} cannot be loaded ({error.__cause__ or error})", _rebuild(device))
    COMPILED[device] = {name for name in OPS if has_kernel(name, device)} - before
    return None


def _obstacle(device: str) -> Problem | None:
    """What forbids to load a library: loading the CUDA one already registers its kernels."""
    if device == "cuda" and torch.version.cuda is None:
        other = "for AMD's GPUs" if torch.version.hip else "without CUDA"
        return Problem(f"torch {torch.__version__} is built {other}")
    if not path(device).is_file():
        return Problem(f"{path(device).name} was not built when sslkernels was installed", _rebuild(device))
    if device == "cuda":
        (built, _), driver = built_for(), driver_version()
        if driver > 0 and driver // 1000 < built // 1000:
            first = f", {DRIVERS[built // 1000]} or later" if built // 1000 in DRIVERS else ""
            return Problem(
                f"the NVIDIA driver is too old: it supports CUDA {version_text(driver)}, and {path(device).name} was "
                f"built with CUDA {version_text(built)}",
                f"Install a driver for CUDA {built // 1000}{first}; or, with an older CUDA toolkit, run in the source "
                f"folder of sslkernels: {BUILD}",
            )
    return None


def _rebuild(device: str) -> str:
    return f"With {TOOLS[device]}, run in the source folder of sslkernels: {BUILD}"


def _load_triton() -> Problem | None:
    """Let Triton serve what no CUDA library does; its kernels are imported at their first call."""
    from sslkernels.ops._registry import LIBRARY
    from sslkernels.triton import KERNELS

    if torch.version.cuda is None and torch.version.hip is None:
        return Problem(f"torch {torch.__version__} is built without CUDA")
    if importlib.util.find_spec("triton") is None:
        return Problem("Triton is not installed", "Run: pip install triton")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        # it compiles the C stub of each launch
        return Problem("Triton needs a C compiler, and none was found", "Run: apt-get install gcc python3-dev")
    for name, module in KERNELS.items():
        if not has_kernel(name, "cuda"):
            LIBRARY.impl(name, _launcher(name, module), "CUDA")
    return None


def _launcher(name: str, module: str) -> Callable[..., Any]:
    reference = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"sslkernels.triton.{module}"), name)

    def run(*arguments: Any) -> Any:
        tensors = _tensors(arguments)
        if not runs_triton(tensors[0].device) or _any_float64(module, tensors):
            return getattr(torch.ops.sslkernels, name).default.redispatch(reference, *arguments)
        with torch.cuda.device_of(tensors[0]):
            return function()(*arguments)

    return run


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    return tensors + [x for xs in arguments if isinstance(xs, list | tuple) for x in xs if isinstance(x, torch.Tensor)]


def _any_float64(module: str, tensors: list[torch.Tensor]) -> bool:
    """Whether an op computes in float64. Of a contrastive op only features say so, no scale, bias, weight or logit."""
    matrices = 2 if module == "contrastive" else 0
    return any(x.dtype == torch.float64 for x in tensors if x.ndim >= matrices)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY
