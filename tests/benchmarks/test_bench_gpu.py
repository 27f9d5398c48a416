# SPDX-License-Identifier: Apache-2.0
"""The cases of the GPU, as far as they can be tried without one: inputs, contenders and formulas, at small sizes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import measure, table
from benchmarks.gpu.cases import CASES, GpuCase
from benchmarks.machine import ROOT

PAIRS = [(gpu, form) for gpu in CASES for form in gpu.case.contenders if not (form.real or form.compile)]


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEVICE", "cpu")


@pytest.mark.parametrize(("gpu", "form"), PAIRS, ids=lambda x: x.name)
def test_every_contender_is_right(gpu: GpuCase, form) -> None:
    assert measure.check(gpu, form)["ok"]


@pytest.mark.parametrize("gpu", CASES, ids=lambda x: x.name)
def test_a_case_has_a_floor_and_its_goals_name_contenders(gpu: GpuCase) -> None:
    assert (gpu.flops > 0) != (gpu.bytes > 0)
    known = {"eager", "gemm" if gpu.flops else "copy", *(form.name for form in gpu.case.contenders)}
    assert {goal.against for goal in gpu.case.goals} <= known
    assert set(gpu.wide) <= set(gpu.case.tiny().make_inputs())


def test_a_wrong_contender_is_told() -> None:
    gpu = next(gpu for gpu in CASES if gpu.case.op == "clip_loss")
    form = gpu.case.contender("open_clip")
    wrong = form.__class__("wrong", lambda **inputs: 1.2 * form.call(**inputs), "nobody")
    assert "error" in measure.check(gpu, wrong)


def test_nothing_is_claimed_that_nobody_measured() -> None:
    text = table.goals(None)
    assert text.count(table.NOT_YET) >= len(CASES) and "met" not in text
    if not list((ROOT / "benchmarks/results").glob("gpu-*.json")):
        assert text in (ROOT / "docs/gpu.md").read_text()


def test_flops_are_those_of_the_products() -> None:
    siglip = next(gpu for gpu in CASES if gpu.case.op == "siglip_loss")
    image = torch.empty(32_768, 768, device="meta")
    with FlopCounterMode(display=False) as products:
        logits = image @ image.T
        _, _ = logits @ image, logits.T @ image
    assert siglip.flops == products.get_total_flops()
