# SPDX-License-Identifier: Apache-2.0
"""The wheel: one for every Python and torch; without a compiler, one that works on the reference."""

from __future__ import annotations

import platform
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALL = """
import warnings
import torch
import sslkernels
from sslkernels.ops import similarity_logsumexp
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        row, column = similarity_logsumexp(torch.eye(2), torch.eye(2))
torch.testing.assert_close(row, torch.tensor([1.0, 1.0]).exp().add(1).log())
print(sslkernels.__file__)
for warning in seen:
    print("WARNING", warning.category.__name__, warning.message)
"""


def installed(run, wheel: Path, target: Path) -> Path:
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    return target


@pytest.fixture(scope="module")
def wheel(build, tmp_path_factory) -> Path:
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("wheel")
    build(folder, **({} if shutil.which("nvcc") else {"SSLKERNELS_CUDA": "0"}))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def pure(build, tmp_path_factory):
    """A build on a machine without any compiler: its wheel and what it said."""
    folder = tmp_path_factory.mktemp("pure")
    log = build(folder, PATH=str(folder), CXX="", CUDA_HOME="")
    return next(folder.glob("*.whl")), log.stdout + log.stderr


def test_tag_names_the_platform_and_no_python(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")


def test_content_is_the_package_and_its_libraries(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sslkernels").rglob("*.py")}
    libraries = {"sslkernels/lib/libsslkernels_cpu.so"}
    if shutil.which("nvcc"):
        libraries.add("sslkernels/lib/libsslkernels_cuda.so")
    assert {n for n in names if ".dist-info/" not in n} == package | libraries | {"sslkernels/py.typed"}


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if n.endswith(("METADATA", "WHEEL"))}
    assert "Root-Is-Purelib: false" in text["WHEEL"]
    required = [line.split(": ")[1] for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra" not in line] == ["torch>=2.11", "numpy"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]


def test_installed_wheel_runs_compiled(wheel: Path, run, tmp_path: Path) -> None:
    target = installed(run, wheel, tmp_path / "site")
    said = run("-c", CALL, PYTHONPATH=str(target)).stdout
    assert said.splitlines() == [str(target / "sslkernels/__init__.py")]


def test_without_a_compiler_the_build_says_what_is_missing(pure) -> None:
    wheel, log = pure
    assert wheel.name.endswith("-py3-none-any.whl")
    assert log.count("sslkernels: warning: no C++ compiler was found") == 1
    assert "apt-get install g++" in log and "pip install --no-build-isolation" in log
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_without_a_compiler_the_reference_serves_and_warns_once(pure, run, tmp_path: Path) -> None:
    target = installed(run, pure[0], tmp_path / "site")
    said = run("-c", CALL, PYTHONPATH=str(target)).stdout.splitlines()
    assert said[0] == str(target / "sslkernels/__init__.py")
    assert len(said) == 2 and said[1].startswith(
        "WARNING RuntimeWarning sslkernels: libsslkernels_cpu.so was not built"
    )
    assert "apt-get install g++" in said[1] and "pip install --no-build-isolation" in said[1]


@pytest.mark.parametrize(
    ("asked", "missing"), [("SSLKERNELS_CPU", "no C++ compiler"), ("SSLKERNELS_CUDA", "no C++ compiler")]
)
def test_what_is_asked_for_and_cannot_be_built_is_an_error(run, tmp_path: Path, asked: str, missing: str) -> None:
    done = run("setup.py", "--version", check=False, cwd=ROOT, PATH=str(tmp_path), CXX="", CUDA_HOME="", **{asked: "1"})
    assert done.returncode != 0 and missing in done.stderr and "apt-get install g++" in done.stderr


def test_cuda_without_nvcc_is_an_error(run, tmp_path: Path) -> None:
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("needs g++")
    (tmp_path / "g++").symlink_to(gxx)
    environment = {"PATH": str(tmp_path), "CXX": "", "CUDA_HOME": "", "SSLKERNELS_CUDA": "1"}
    done = run("setup.py", "--version", check=False, cwd=ROOT, **environment)
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr and "Install the CUDA toolkit" in done.stderr
