# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/cuda for the CPU, with tests/cuda/emulator in the place of CUDA, and calls its ops there. No GPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import sslkernels.ops  # noqa: F401  defines the ops

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "tests"
EMULATOR = Path(__file__).with_name("emulator")
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def library() -> Path:
    """The emulated library; compiled again when a source, a flag or the compiler's name has changed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sources = sorted(set((ROOT / "csrc/cuda").glob("*.cu")) - {ROOT / "csrc/cuda/version.cu"})
    headers = sorted(path for path in (ROOT / "csrc").glob("*/*.*") if path.suffix in (".h", ".inl"))
    includes = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-isystem", f"{TORCH / 'include'}"]
    # -ffp-contract=off: the kernels that promise bits say themselves where they fuse; -U_FORTIFY_SOURCE: its longjmp
    # refuses to change stacks
    flags = ["-x", "c++", "-O1", "-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-attributes", "-U_FORTIFY_SOURCE"]
    flags.append("-DSSLKERNELS_EMULATED")
    command = [*compiler.split(), *flags, "-DTORCH_TARGET_VERSION=0x020b000000000000", *includes]
    texts = [path.read_bytes() for path in (*sources, *headers, *sorted(EMULATOR.iterdir()))]
    key = hashlib.sha256("\0".join(command).encode() + b"".join(texts)).hexdigest()[:16]
    target = FOLDER / key / "libsslkernels_emulated.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            objects = [f"{scratch}/{path.stem}.o" for path in sources]
            steps = [[*command, "-c", str(source), "-o", out] for source, out in zip(sources, objects)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda step: subprocess.run(step, check=True), steps))
            link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", f"{scratch}/{target.name}"]
            subprocess.run([*compiler.split(), "-shared", *objects, *link], check=True)
            os.replace(f"{scratch}/{target.name}", target)
    return target


@pytest.fixture(scope="session")
def emulated(library: Path) -> Callable[..., Any]:
    """`emulated(name, *arguments)`: the op's CUDA kernels on tensors of the CPU."""
    torch.ops.load_library(library)

    def call(name: str, *arguments: Any) -> Any:
        op = getattr(torch.ops.sslkernels, name).default
        with torch.no_grad():
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *arguments)

    return call
