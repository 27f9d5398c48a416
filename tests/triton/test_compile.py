# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every architecture and keeps to its registers and shared memory. Needs no GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.occupancy import FLOAT_ATOMICS, SHARED_LIMIT, TARGETS, families

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / "sslkernels/triton"
pytest.importorskip("triton")
UNIT = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of all families and targets, by a process where Triton compiles and does not interpret."""
    path = tmp_path_factory.mktemp("occupancy") / "all.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.occupancy", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", families())
def test_resources(compiled: list[dict], family: str, target: str) -> None:
    launches = importlib.import_module(f"benchmarks.launches.{family}")
    found = [x for x in compiled if x["family"] == family and x["target"] == target]
    assert {x["case"] for x in found} == set(launches.CASES)
    for x in found:
        assert x["shared"] <= SHARED_LIMIT[target], x
        assert x["spills"] <= launches.SPILLS.get(x["kernel"], 0), x


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", families())
def test_matrix_units(compiled: list[dict], family: str, target: str) -> None:
    named = importlib.import_module(f"benchmarks.launches.{family}").TENSOR_CORES
    found = [x for x in compiled if x["family"] == family and x["target"] == target]
    assert named <= {x["kernel"] for x in found}
    for x in found:
        if x["kernel"] in named and x["dtype"] != "float32":
            assert x["matrix"] == UNIT[target], x


def test_no_sum_is_atomic(compiled: list[dict]) -> None:
    """Floating atomics add up in the order in which they come: other bits at every call."""
    assert [x for x in compiled if x["atomics"]] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", True),
        ("red.global.add.noftz.bf16x2 [%rd1], %r2;", True),
        ("global_atomic_add_f32 v0, v1, s[0:1]", True),
        ("atom.shared.cas.b32 %r1, [%r2], %r3, %r4;", False),
        ("redux.sync.add.s32 %r1, %r2, %r3;", False),
    ],
)
def test_atomics_are_found(line: str, found: bool) -> None:
    assert bool(FLOAT_ATOMICS.search(line)) == found


def test_every_kernel_is_compiled(compiled: list[dict]) -> None:
    """One that no case of benchmarks/launches launches would be compiled at a user's first step, untried."""
    modules = [importlib.import_module(f"sslkernels.triton.{path.stem}") for path in TRITON.glob("*.py")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {x["kernel"] for x in compiled}
