# SPDX-License-Identifier: Apache-2.0
"""Compiles bindings.cpp with the tile functions, by the flags of setup.py, into a module that no wheel holds."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "tests"
LEVELS = {0: "baseline", 1: "v3", 2: "v4"}


def flags_of_setup() -> list[str]:
    """CXX_FLAGS: importing setup.py would run it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CXX_FLAGS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no CXX_FLAGS")


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The bindings; compiled again when a source, a flag or the compiler's name has changed."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    cpu = ROOT / "csrc/cpu"
    sources = [Path(__file__).with_name("bindings.cpp"), cpu / "tiles.cpp", cpu / "levels.cpp"]
    headers = [
        cpu / "tiles.h",
        cpu / "levels.h",
        *sorted((ROOT / "csrc/common").glob("*.h")),
        *sorted(cpu.glob("*.inl")),
    ]
    includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    command = [*compiler.split(), "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", *flags_of_setup(), *includes]
    key = hashlib.sha256("\0".join(command).encode() + b"".join(path.read_bytes() for path in [*sources, *headers]))
    name = f"sslkernels_tiles{sysconfig.get_config_var('EXT_SUFFIX')}"
    target = FOLDER / key.hexdigest()[:16] / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            # each worker of a parallel run may compile; the last one to rename wins, with the same bytes
            objects = [f"{scratch}/{path.stem}.o" for path in sources]
            steps = [[*command, "-c", str(source), "-o", out] for source, out in zip(sources, objects)]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda step: subprocess.run(step, check=True), steps))
            subprocess.run([*compiler.split(), "-shared", *objects, "-o", f"{scratch}/{name}"], check=True)
            os.replace(f"{scratch}/{name}", target)
    spec = importlib.util.spec_from_file_location("sslkernels_tiles", target)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(params=LEVELS, ids=LEVELS.values())
def level(request: pytest.FixtureRequest, module: ModuleType) -> Any:
    """Run the test once for each instruction set that this processor has."""
    module.set_level(request.param)
    if module.level() != request.param:
        pytest.skip(f"this processor does not run {LEVELS[request.param]}")
    yield request.param
    module.set_level(2)


@pytest.fixture(params=["float32", "float64"])
def tile(request: pytest.FixtureRequest, module: ModuleType, level: int) -> Any:
    """The tile functions of one arithmetic type and one instruction set."""
    return getattr(module, request.param)


@pytest.fixture
def dtype(tile: Any) -> str:
    return tile.__name__.rpartition(".")[2]
