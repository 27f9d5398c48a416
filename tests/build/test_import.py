# SPDX-License-Identifier: Apache-2.0
"""`import sslkernels` is quick and light; `python -m sslkernels info` tells the truth."""

from __future__ import annotations

import json

import pytest

from sslkernels.ops._registry import OPS

LIMIT = 0.3  # seconds of the processor beyond torch's own: other tests may keep an import waiting
HEAVY = ("triton", "matplotlib", "sklearn", "skimage", "torch._dynamo", "torch._inductor", "torch.distributed.tensor")
IMPORT = f"""
import sys, time, torch
start = time.process_time()
import sslkernels
print(time.process_time() - start, *[name for name in {HEAVY} if name in sys.modules])
"""


def test_cold_import(run) -> None:
    runs = [run("-c", IMPORT).stdout.split() for _ in range(3)]  # the best of three: other work may disturb one
    assert min(float(seconds) for seconds, *_ in runs) < LIMIT
    assert runs[0][1:] == []


def test_info_covers_every_op(run) -> None:
    facts = json.loads(run("-m", "sslkernels", "info", "--json").stdout)
    assert set(facts["ops"]) == set(OPS)
    for served in facts["ops"].values():
        assert served["cpu"] in ("compiled", "torch", "reference")
        assert served["cuda"] in ("compiled", "triton", "torch", "reference", "unavailable")
    assert facts["versions"]["torch"] and facts["threads"]["torch"] >= 1 and "cpu" in facts["devices"]
    assert facts["libraries"]["cpu"]["loaded"] or facts["libraries"]["cpu"]["problem"]


def test_info_shows_a_capped_instruction_set(run) -> None:
    facts = json.loads(run("-m", "sslkernels", "info", "--json", SSLKERNELS_CPU_LEVEL="baseline").stdout)
    if not facts["libraries"]["cpu"]["loaded"]:
        pytest.skip("no CPU library")
    assert facts["instruction_set"]["level"] == facts["instruction_set"]["cap"] == "baseline"


def test_info_for_people(run) -> None:
    said = run("-m", "sslkernels", "info").stdout
    assert all(name in said for name in OPS)
    assert "instruction set" in said and "threads" in said
