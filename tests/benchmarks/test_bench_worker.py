# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from benchmarks import runner, worker
from benchmarks.case import Contender, LossStep
from benchmarks.cases import FAMILIES, find

CASE = find("nt_xent-256-128").tiny()
LEAN = CASE.contender("lean")


class OffGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 1.001


def test_the_gate_lets_the_right_loss_pass():
    result = worker.check(CASE, ["lean", "lightly", "solo-learn"])
    assert all(entry["ok"] and entry["value_error"] < 1e-6 for entry in result.values())


@pytest.mark.parametrize(
    "call",
    [
        lambda **inputs: LEAN.call(**inputs) * 1.001,
        lambda **inputs: OffGradient.apply(LEAN.call(**inputs)),
        lambda **inputs: LEAN.call(**inputs) * torch.nan,
        lambda **inputs: LEAN.call(**inputs)[None],
        lambda **inputs: torch.zeros(3) @ torch.zeros(4),
    ],
    ids=["value", "gradient", "nan", "shape", "raises"],
)
def test_the_gate_stops_a_wrong_one(call):
    wrong = replace(CASE, contenders=(*CASE.contenders, Contender("wrong", call, "a test")))
    entry = worker.check(wrong, ["wrong"])["wrong"]
    assert not entry["ok"] and entry["error"]


def test_contenders_take_turns():
    class Step(LossStep):
        def __init__(self, name):
            self.name = name

        def forward(self):
            calls.append(self.name)

        def backward(self, loss):
            pass

    calls = []
    samples = worker.interleave({name: Step(name) for name in "abc"}, rounds=3, shortest=0.0)
    assert "".join(calls[-9:]) == "abcbcacab"  # each is first once
    assert all(len(sample["forward"]) == len(sample["backward"]) == 3 for sample in samples.values())


def test_short_steps_are_repeated():
    repeated = worker.interleave({"lean": CASE.step("lean", CASE.make_inputs())}, rounds=2, shortest=0.01)
    assert all(0 < f + b < 0.01 for f, b in zip(repeated["lean"]["forward"], repeated["lean"]["backward"], strict=True))


@pytest.mark.parametrize("name", [case.name for cases in FAMILIES.values() for case in cases])
def test_inputs_are_the_same_every_time_and_in_both_precisions(name):
    case = find(name).tiny()
    first, again, double = case.make_inputs(), case.make_inputs(), case.make_inputs(torch.float64)
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[key]) and torch.equal(value.to(double[key].dtype), double[key])
            assert value.requires_grad == double[key].requires_grad
        else:
            assert value == again[key] == double[key]


def test_gemm_floor_does_the_products():
    inputs = find("info_nce-4096-128").tiny().make_inputs()
    step = find("info_nce-4096-128").step("gemm", inputs)
    step.backward(step.forward())
    q, k = inputs["query"].detach(), inputs["key"].detach()
    torch.testing.assert_close(step.logits, q @ k.T)
    torch.testing.assert_close(step.dq, q @ k.T @ k)
    torch.testing.assert_close(step.dk, k @ q.T @ q)


def test_a_case_is_measured_in_processes_of_its_own():
    said = []
    options = runner.Options(rounds=2, threads=1, regimes=("kept",), memory=False, shortest=0.0)
    wrong = replace(CASE, contenders=(LEAN,))
    record = runner.measure(wrong, options, {"commit": None}, said.append)
    assert record["check"]["lean"]["ok"] and not said
    assert {name: len(sample["backward"]) for name, sample in record["time"]["kept"].items()} == {"lean": 2, "gemm": 2}


def test_a_failing_job_says_why():
    with pytest.raises(runner.JobError, match="no case 'nothing'"):
        runner.launch({"job": "check", "case": "nothing", "threads": 1, "names": []}, {})


def test_the_allocator_of_the_caller_does_not_reach_a_job(monkeypatch):
    seen = {}

    def fake(command, **options):
        seen.update(options["env"])
        raise KeyboardInterrupt

    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runner.subprocess, "run", fake)
    with pytest.raises(KeyboardInterrupt):
        runner.launch({"job": "time"}, {"MALLOC_MMAP_MAX_": "0"})
    assert "MALLOC_ARENA_MAX" not in seen and "OMP_NUM_THREADS" not in seen and seen["MALLOC_MMAP_MAX_"] == "0"
