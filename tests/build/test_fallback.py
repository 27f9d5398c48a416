# SPDX-License-Identifier: Apache-2.0
"""What the loader refuses to load and why; the warning of a fallback: once for each reason, with the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sslkernels import _library, info
from sslkernels.triton import KERNELS

BY_TRITON = next(iter(KERNELS))
COMPILED_ONLY = "ema_update_"


@pytest.fixture(autouse=True)
def unannounced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_announced", set())
    monkeypatch.setattr(_library, "PROBLEMS", {})


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that says what a CUDA library says about itself, under a torch with CUDA; loading it would fail."""
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    path = _library.path("cuda")
    path.write_bytes(b"\x7fELF\0sslkernels: CUDA 13000 for 750,900\0rest")
    return path


def on(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, device=device, dtype=dtype)


def said(name: str, *arguments: object) -> str:
    with pytest.warns(RuntimeWarning) as seen:
        _library.warn_fallback(name, arguments)
    assert len(seen) == 1
    return str(seen[0].message)


def silent(name: str, *arguments: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.warn_fallback(name, arguments)


@pytest.mark.parametrize("driver", [12080, 11040])
def test_a_driver_of_an_older_cuda_is_refused_before_loading(library: Path, monkeypatch, driver: int) -> None:
    monkeypatch.setattr(_library, "driver_version", lambda: driver)
    problem = _library._load("cuda")  # if it were loaded, the reason would be that it cannot be
    assert problem is not None
    assert f"driver is too old: it supports CUDA {driver // 1000}.{driver % 100 // 10}, and" in problem.reason
    assert "was built with CUDA 13.0" in problem.reason
    assert "for CUDA 13, 580 or later" in problem.remedy and "older CUDA toolkit" in problem.remedy


@pytest.mark.parametrize("driver", [13000, 13020, 14000, 0], ids=["same", "newer", "next major", "no driver"])
def test_other_drivers_load_the_library(library: Path, monkeypatch, driver: int) -> None:
    monkeypatch.setattr(_library, "driver_version", lambda: driver)
    problem = _library._load("cuda")
    assert problem is not None and "cannot be loaded" in problem.reason  # the file is no library: it was tried


def test_the_driver_is_asked_without_initialising_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """libcuda.so.1 with the one function that may be called; any other is an error."""

        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, result: object) -> int:
            result._obj.value = 12090  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(_library.ctypes, "CDLL", Driver)
    assert _library.driver_version() == 12090


def test_no_driver_has_version_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(_library.ctypes, "CDLL", missing)
    assert _library.driver_version() == 0


def test_the_built_library_says_what_it_was_built_for() -> None:
    if not _library.path("cuda").is_file():
        pytest.skip("the CUDA library was not built: nvcc is missing")
    cuda, architectures = _library.built_for()
    assert cuda >= 12000 and architectures == sorted(architectures) and architectures[0] >= 750


def test_a_missing_library_names_the_tool(library: Path) -> None:
    library.unlink()
    problem = _library._load("cuda")
    assert problem is not None and "was not built" in problem.reason
    assert "CUDA toolkit (nvcc)" in problem.remedy and "pip install --no-build-isolation" in problem.remedy


@pytest.mark.parametrize(("hip", "words"), [(None, "without CUDA"), ("7.0", "for AMD's GPUs")])
def test_a_torch_without_cuda_does_not_look_for_the_library(library: Path, monkeypatch, hip, words: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", hip)
    problem = _library._load("cuda")
    assert problem is not None and words in problem.reason


def test_without_triton_its_ops_say_so(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    problem = _library._load_triton()
    assert problem == _library.Problem("Triton is not installed", "Run: pip install triton")
    _library.PROBLEMS["triton"] = problem
    assert "Triton is not installed: the plain PyTorch reference serves cuda tensors" in said(BY_TRITON, on("cuda"))


def test_triton_needs_a_c_compiler(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_library.shutil, "which", lambda name: None)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: object())
    problem = _library._load_triton()
    assert problem is not None and "C compiler" in problem.reason and "gcc" in problem.remedy


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "runs_triton", lambda device: False)
    assert "cuda:0 is older than compute capability 8.0, which Triton's" in said(BY_TRITON, on("cuda"))


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_triton_needs_capability_8(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _library.runs_triton.__wrapped__(torch.device("cuda:0")) is runs


def test_float64_on_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "runs_triton", lambda device: True)
    assert "not float64: the plain PyTorch reference" in said(BY_TRITON, on("cuda"), on("cuda", torch.float64))


def test_what_only_the_library_has_tells_of_the_library() -> None:
    _library.PROBLEMS["cuda"] = _library.Problem("no library", "Get nvcc.")
    assert said(COMPILED_ONLY, [on("cuda")]).endswith("slower and with more memory. Get nvcc.")


def test_warns_once_for_each_reason() -> None:
    _library.PROBLEMS.update(cpu=_library.Problem("no library"), cuda=_library.Problem("no nvcc"))
    assert "no library: the plain PyTorch reference serves cpu tensors" in said("standardize", torch.zeros(1))
    assert "no nvcc" in said(COMPILED_ONLY, [on("cuda")])
    silent("standardize", torch.zeros(1))
    silent("l2_normalize", torch.zeros(1))
    silent(COMPILED_ONLY, [on("cuda")], [on("cuda")])


def test_a_device_without_kernels_has_no_remedy() -> None:
    assert "no kernels for mps devices: the plain" in said("standardize", on("mps"))


def test_silent_while_tracing() -> None:
    tensor = on("mps")

    def traced(x: torch.Tensor) -> torch.Tensor:
        _library.warn_fallback("standardize", (tensor,))
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.compile(traced, fullgraph=True, backend="eager")(torch.zeros(1))
    assert _library._announced == set()


def test_info_tells_problem_and_remedy(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "driver_version", lambda: 12080)
    problem = _library._load("cuda")
    assert problem is not None
    _library.PROBLEMS.update(
        cuda=problem, triton=_library.Problem("Triton is not installed", "Run: pip install triton")
    )
    facts = info.gather()
    state = facts["libraries"]["cuda"]
    assert not state["loaded"] and state["problem"] == problem.reason and state["remedy"] == problem.remedy
    assert (state["runtime"], state["driver"], state["architectures"]) == ("13.0", "12.8", [75, 90])
    lines = info.text(facts).splitlines()
    assert f"cuda library: {problem.reason}. {problem.remedy} (CUDA 13.0 for sm_75, sm_90; driver: 12.8)" in lines
    assert "triton kernels: Triton is not installed. Run: pip install triton" in lines
