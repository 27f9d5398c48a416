# SPDX-License-Identifier: Apache-2.0
"""What the libraries need from outside: the stable C shim of torch, the C++ runtime and libc. Nothing of Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sslkernels import _library

SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
RUNTIME = re.compile(r".+@+(GLIBC|GLIBCXX|CXXABI|CXXABI_ARM|GCC)_[\d.]+$")
LINKER = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}  # weak, never required
NEEDED = {
    "libtorch_cpu.so",
    "libtorch_cuda.so",
    "libstdc++.so.6",
    "libpthread.so.0",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
}


@pytest.fixture(params=["cpu", "cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    path = _library.path(request.param)
    if not path.is_file():
        pytest.skip(f"{path.name} was not built: {'nvcc' if request.param == 'cuda' else 'a compiler'} is missing")
    return path


def tool(name: str, *arguments: str) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name} (binutils)")
    return subprocess.run([name, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def test_undefined_symbols_are_stable(library: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", "".join((include / shim).read_text() for shim in SHIMS)))
    symbols = {line.split()[-1] for line in tool("nm", "-D", "--undefined-only", str(library))}
    foreign = {symbol for symbol in symbols if not RUNTIME.match(symbol)} - LINKER
    assert foreign - declared == set()


def test_no_python_symbol(library: Path) -> None:
    names = [line.split()[-1] for line in tool("nm", "-D", str(library))]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


def test_needed_libraries(library: Path) -> None:
    found = {
        match[1] for line in tool("readelf", "-d", str(library)) if (match := re.search(r"NEEDED.*\[(.+)\]", line))
    }
    assert {name for name in found if not name.startswith("ld-linux")} <= NEEDED
    assert ("libtorch_cuda.so" in found) == library.name.endswith("_cuda.so")
