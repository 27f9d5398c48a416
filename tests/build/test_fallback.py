# SPDX-License-Identifier: Apache-2.0
"""The warning of a fallback: once for each device type, with the remedy, never while torch.compile traces."""

from __future__ import annotations

import warnings

import pytest
import torch

from sslkernels import _library


@pytest.fixture(autouse=True)
def unannounced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_announced", set())


def test_warns_once_for_each_device_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "PROBLEMS", {"cpu": "no library", "cuda": "no nvcc"})
    with pytest.warns(RuntimeWarning, match=r"no library.*apt-get install g\+\+.*pip install --no-build-isolation"):
        _library.warn_fallback("cpu")
    with pytest.warns(RuntimeWarning, match=r"no nvcc.*CUDA toolkit"):
        _library.warn_fallback("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.warn_fallback("cpu")
        _library.warn_fallback("cuda")


def test_a_device_without_kernels_has_no_remedy() -> None:
    with pytest.warns(RuntimeWarning, match="no kernels for mps devices"):
        _library.warn_fallback("mps")


def test_silent_while_tracing() -> None:
    def traced(x: torch.Tensor) -> torch.Tensor:
        _library.warn_fallback("mps")
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.compile(traced, fullgraph=True, backend="eager")(torch.zeros(1))
    assert _library._announced == set()
