# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, remembers why one is missing, and announces a fallback once."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "lib"
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
TOOLS = {"cpu": "a C++ compiler (apt-get install g++)", "cuda": "the CUDA toolkit (nvcc)"}

# Device type -> why its library does not serve; a device that is not in here has its library.
PROBLEMS: dict[str, str] = {}
# Device type -> the ops that its compiled library serves.
COMPILED: dict[str, set[str]] = {"cpu": set(), "cuda": set()}

_announced: set[str] = set()


def load() -> None:
    """Load the library of each device where it can run; the ops must be defined by now."""
    for device in COMPILED:
        problem = _load(device)
        if problem:
            PROBLEMS[device] = problem
    _load_triton()


def path(device: str) -> Path:
    return FOLDER / f"libsslkernels_{device}.so"


def has_kernel(name: str, device: str) -> bool:
    """Whether the op has a kernel of its own for the device, compiled or not."""
    key = getattr(torch._C.DispatchKey, device.upper())
    return getattr(torch.ops.sslkernels, name).default.has_kernel_for_dispatch_key(key)


def cuda_versions() -> tuple[str, str | None]:
    """CUDA versions of the loaded library and of the driver, which is None where there is none."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(path("cuda"))).sslkernels_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    texts = [f"{v.value // 1000}.{v.value % 1000 // 10}" for v in (runtime, driver)]
    return texts[0], texts[1] if driver.value else None


def warn_fallback(device: str) -> None:
    """Warn, once for each device type, that the reference serves it, why, and what to do."""
    if device in _announced or torch.compiler.is_compiling():
        return
    _announced.add(device)
    warnings.warn(f"sslkernels: {_remedy(device)}", RuntimeWarning, stacklevel=4)


def _load(device: str) -> str:
    """Load one library; what is in the way, if anything is."""
    from sslkernels.ops._registry import OPS  # which imports this module

    if device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not path(device).is_file():
        return f"{path(device).name} was not built when sslkernels was installed"
    before = {name for name in OPS if has_kernel(name, device)}
    try:
        torch.ops.load_library(path(device))
    except OSError as error:
        return f"{path(device).name} cannot be loaded ({error.__cause__ or error})"
    COMPILED[device] = {name for name in OPS if has_kernel(name, device)} - before
    if device == "cuda":
        runtime, driver = cuda_versions()
        if driver and int(driver.split(".")[0]) < int(runtime.split(".")[0]):  # then it has registered nothing
            return f"the NVIDIA driver supports CUDA {driver}, and the kernels were built with CUDA {runtime}"
    return ""


def _load_triton() -> None:
    """Let Triton serve what no CUDA library does; its kernels are imported at their first call."""
    from sslkernels.ops._registry import LIBRARY
    from sslkernels.triton import KERNELS

    if torch.version.cuda is None and torch.version.hip is None:
        return
    if importlib.util.find_spec("triton") is None:
        PROBLEMS.setdefault("triton", "Triton is not installed")
        return
    for name, module in KERNELS.items():
        if not has_kernel(name, "cuda"):
            LIBRARY.impl(name, _launcher(name, module), "CUDA")


def _launcher(name: str, module: str) -> Callable[..., Any]:
    reference = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"sslkernels.triton.{module}"), name)

    def run(*arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        tensors += [x for xs in arguments if isinstance(xs, list | tuple) for x in xs if isinstance(x, torch.Tensor)]
        if not _runs_triton(tensors[0].device) or any(x.dtype == torch.float64 for x in tensors):
            return getattr(torch.ops.sslkernels, name).default.redispatch(reference, *arguments)
        with torch.cuda.device_of(tensors[0]):
            return function()(*arguments)

    return run


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _remedy(device: str) -> str:
    slower = f"the plain PyTorch reference serves {device} tensors, slower and with more memory"
    if device not in COMPILED:
        return f"there are no kernels for {device} devices: {slower}."
    if device not in PROBLEMS:
        return f"an op has no compiled kernel for {device} yet: {slower} (`python -m sslkernels info` lists them)."
    return f"{PROBLEMS[device]}: {slower}. With {TOOLS[device]}, run in the source folder of sslkernels: {BUILD}"
