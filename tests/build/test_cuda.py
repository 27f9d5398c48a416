# SPDX-License-Identifier: Apache-2.0
"""The CUDA library as nvcc made it: code for each architecture, no spills, no stack, CUDA's runtime inside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from sslkernels import _library

ASKED = os.environ.get("SSLKERNELS_CUDA_ARCHITECTURES") or "80,90,100"
LIMIT = 48 << 10  # bytes of shared memory that a kernel has without asking


@pytest.fixture(scope="module")
def library() -> Path:
    path = _library.path("cuda")
    if not path.is_file():
        pytest.skip("the CUDA library was not built: nvcc is missing")
    return path


@pytest.fixture(scope="module")
def kernels(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, name) of each kernel -> REG, STACK, SHARED, LOCAL, ..."""
    program = shutil.which("cuobjdump", path=f"{sysconfig.get_path('purelib')}/nvidia/cu13/bin:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs cuobjdump (requirements-test.txt)")
    text = subprocess.run([program, "-res-usage", str(library)], check=True, capture_output=True, text=True).stdout
    found, architecture, name = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r" *Function ([^ :]+):", line):
            name = match[1]
        elif line.strip().startswith("REG:"):
            found[architecture, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def test_every_kernel_is_there_for_every_architecture(library: Path, kernels) -> None:
    built = {f"sm_{architecture // 10}" for architecture in _library.built_for()[1]}
    assert {f"sm_{number}" for number in re.findall(r"\d+", ASKED)} <= built
    names = {name for _, name in kernels}
    assert names and set(kernels) == {(architecture, name) for architecture in built for name in names}


def test_no_kernel_spills_or_has_a_stack(kernels) -> None:
    # a spilled register lies on the stack, and so does an array that is indexed at run time
    assert {kernel: use for kernel, use in kernels.items() if use["STACK"] or use["LOCAL"]} == {}


def test_static_shared_memory_is_within_the_limit(kernels) -> None:
    assert {kernel: use for kernel, use in kernels.items() if use["SHARED"] > LIMIT} == {}
