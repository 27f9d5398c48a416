# SPDX-License-Identifier: Apache-2.0
"""`benchmarks` is not installed with the package: it is imported from the repository root."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def record() -> dict[str, Any]:
    """A case as the runner writes it, with round numbers: ours takes 1 + 1 ms, lightly 4 + 8 ms, and so on."""

    def samples(forward: float, backward: float) -> dict[str, list[float]]:
        return {"forward": [forward] * 5, "backward": [backward] * 5}

    return {
        "op": "nt_xent",
        "shape": {"N": 2048, "D": 128},
        "images": 4096,
        "eager": ["lightly", "solo-learn"],
        "gemms": 3,
        "sources": {"sslkernels": "this library", "lightly": "lightly's file", "solo-learn": "solo's", "lean": "plain"},
        "goals": [
            {"what": "time", "against": "lightly", "at_least": 6.0, "at_most": None},
            {"what": "time", "against": "eager", "at_least": 5.0, "at_most": None},
            {"what": "time", "against": "gemm", "at_least": None, "at_most": 0.8},
            {"what": "memory", "against": "lightly", "at_least": None, "at_most": 0.03},
        ],
        "check": {"sslkernels": {"ok": True, "value_error": 1e-8, "gradient_error": 1e-7}},
        "time": {
            regime: {
                "sslkernels": samples(0.001, 0.001),
                "lightly": samples(0.004, 0.008),
                "solo-learn": samples(0.003, 0.005),
                "lean": samples(0.002, 0.003),
                "gemm": samples(0.001, 0.0015),
            }
            for regime in ("kept", "default")
        },
        "memory": {"sslkernels": 6.0, "lightly": 268.0, "solo-learn": 280.0, "lean": 196.0},
        "provenance": {
            "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-01", "python": "3.11", "torch": "2.13.0",
            "blas": "mkl", "instruction_set": "v4", "without_kernel": [],
            "threads": 2, "command": "python -m benchmarks", "rounds": 5,
        },
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    return copy.deepcopy({
        "family": "contrastive",
        "machine": {"name": "a-2-core", "cpu": "A CPU", "cores": 2, "l2_kib": 2048, "l3_kib": None},
        "encoder": {"name": "a CNN", "seconds_per_image": 1e-6},
        "cases": {"nt_xent-2048-128": record()},
    })  # fmt: skip
