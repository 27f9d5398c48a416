# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from benchmarks import runner, worker
from benchmarks.case import COTANGENT, Case, Contender, ContenderStep
from benchmarks.cases import FAMILIES, find
from benchmarks.floors import Copy

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


def test_contenders_take_turns_and_start_each_sample_anew():
    class Step:
        def __init__(self, name):
            self.name = name

        def restore(self):
            restored.append(self.name)

        def forward(self):
            calls.append(self.name)

        def backward(self, loss):
            pass

    calls, restored = [], []
    samples = worker.interleave({name: Step(name) for name in "abc"}, rounds=3, shortest=0.0)
    assert "".join(calls[-9:]) == "abcbcacab"  # each is first once
    assert "".join(restored) == "abcbcacab"
    assert all(len(sample["forward"]) == len(sample["backward"]) == 3 for sample in samples.values())


def test_short_steps_are_repeated():
    repeated = worker.interleave({"lean": CASE.step("lean", CASE.make_inputs())}, rounds=2, shortest=0.01)
    assert all(0 < f + b < 0.01 for f, b in zip(repeated["lean"]["forward"], repeated["lean"]["backward"], strict=True))


def same(a, b, dtype=None):
    if isinstance(a, list):
        return all(same(*pair, dtype) for pair in zip(a, b, strict=True))
    if not isinstance(a, torch.Tensor):
        return a == b
    floating = dtype and a.is_floating_point()
    return torch.equal(a.to(dtype) if floating else a, b) and a.requires_grad == b.requires_grad


@pytest.mark.parametrize("name", [case.name for cases in FAMILIES.values() for case in cases])
def test_inputs_are_the_same_every_time_and_in_both_precisions(name):
    case = find(name).tiny()
    first, again, double = case.make_inputs(), case.make_inputs(), case.make_inputs(torch.float64)
    for key, value in first.items():
        assert same(value, again[key]) and same(value, double[key], torch.float64), key


def double(x, weight, ids):
    return x[:, ids] * weight


def columns_first(inputs):
    return {**inputs, "x": inputs["x"].t()}


def vector_case(*contenders):
    """Its result is no scalar, and one contender keeps its input transposed."""

    def inputs(generator, N, D):
        x = torch.randn(N, D, generator=generator).requires_grad_()
        weight = torch.randn(2, generator=generator).requires_grad_()
        cotangent = torch.randn(N, 2, generator=generator)
        return {"x": x, "weight": weight, "ids": torch.tensor([2, 0]), COTANGENT: cotangent}

    return Case("vector", "vector", {"N": 5, "D": 3}, inputs, contenders, eager=(), formula=double)


def test_a_result_that_is_no_scalar_is_weighed_by_the_cotangent():
    transposed = Contender("transposed", lambda x, weight, ids: x[ids].t() * weight, "", prepare=columns_first)
    case = vector_case(Contender("plain", double, ""), transposed)
    assert all(entry["ok"] for entry in worker.check(case, ["plain", "transposed"]).values())
    inputs = case.make_inputs()
    dx, dweight = case.step("plain", inputs).backward(case.step("plain", inputs).call(**{
        k: v for k, v in inputs.items() if k != COTANGENT
    }))  # fmt: skip
    torch.testing.assert_close(dx[:, 2], inputs[COTANGENT][:, 0] * inputs["weight"][0])
    torch.testing.assert_close(dweight, (inputs[COTANGENT] * inputs["x"][:, [2, 0]]).sum(0))
    # What is timed has the contender's layout: its leaf is the transposed one.
    timed = case.step("transposed", inputs)
    assert timed.backward(timed.forward())[0].shape == (3, 5)


def test_a_gradient_that_only_the_cotangent_shows_is_stopped():
    # The sum of x[:, ids] is right, its rows are not.
    wrong = Contender("wrong", lambda x, weight, ids: double(x, weight, ids).mean(1, keepdim=True).expand(-1, 2), "")
    assert not worker.check(vector_case(wrong), ["wrong"])["wrong"]["ok"]


def in_place_case(**contenders):
    def inputs(generator, N):
        return {"targets": [torch.randn(N, generator=generator)], "step": 2.0}

    return Case(
        "add", "add_", {"N": 4}, inputs, tuple(Contender(name, call, "") for name, call in contenders.items()),
        eager=(), formula=lambda targets, step: [targets[0] + step], changes=("targets",),
    )  # fmt: skip


def test_a_step_in_place_has_its_own_state_which_each_sample_finds_anew():
    case = in_place_case(add=lambda targets, step: [targets[0].add_(step)], twice=lambda targets, step: [
        targets[0].add_(step).add_(step)
    ])  # fmt: skip
    result = worker.check(case, ["add", "twice"])
    assert result["add"]["ok"] and not result["twice"]["ok"]
    inputs = case.make_inputs()
    start = inputs["targets"][0].clone()
    step = case.step("add", inputs)
    for _ in range(3):
        step.restore()
        step.forward()
        (after,) = step.forward()
        assert step.backward([after]) == () and torch.equal(after, start + 2.0 + 2.0)
    assert torch.equal(inputs["targets"][0], start)  # the next contender starts from there


class Overwrite(torch.autograd.Function):
    """x ** 2 / 2, whose gradient x it finds in the memory of its input; there it leaves twos."""

    @staticmethod
    def forward(ctx, x):
        ctx.gradient = x.detach()
        value = x.square().sum() / 2
        ctx.save_for_backward(ctx.gradient.clone())
        ctx.gradient.fill_(2.0)
        return value

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def test_a_contender_that_overwrites_its_input_has_its_own():
    def inputs(generator, N):
        return {"x": torch.arange(float(N)).requires_grad_()}

    over = Contender("over", lambda x: Overwrite.apply(x), "", changes=("x",))
    plain = Contender("plain", lambda x: x.square().sum() / 2, "")
    case = Case("half", "half", {"N": 4}, inputs, (over, plain), eager=(), formula=plain.call)
    assert all(entry["ok"] for entry in worker.check(case, ["over", "plain", "over"]).values())
    made = case.make_inputs()
    step = case.step("over", made)
    for _ in range(2):
        step.restore()
        assert torch.equal(step.backward(step.forward())[0], torch.arange(4.0))
    assert torch.equal(step.inputs["x"], torch.full((4,), 2.0)) and step.inputs["x"].requires_grad
    assert torch.equal(made["x"], torch.arange(4.0))


def test_leaves_may_be_the_parts_that_a_contender_takes_apart():
    def inputs(generator, N):
        return {"x": torch.randn(N, 3, generator=generator).requires_grad_()}

    def apart(inputs):
        return {"rows": list(inputs["x"].chunk(2))}

    parts = Contender("parts", lambda rows: (rows[0] * rows[1]).sum(), "", prepare=apart)
    whole = Contender("whole", lambda x: (x[:2] * x[2:]).sum(), "")
    case = Case("pairs", "pairs", {"N": 4}, inputs, (parts, whole), eager=(), formula=whole.call)
    assert all(entry["ok"] for entry in worker.check(case, ["parts", "whole"]).values())
    made = case.make_inputs()
    step = case.step("parts", made)
    first, second = step.backward(step.forward())  # a gradient each: nothing is put together again
    assert torch.equal(first, made["x"][2:]) and torch.equal(second, made["x"][:2])
    assert step.inputs["rows"][0].data_ptr() == made["x"].data_ptr()


def test_what_has_no_gradient_is_judged_too():
    def inputs(generator, N):
        return {"x": torch.randn(N, generator=generator).requires_grad_()}

    right = Contender("right", lambda x: (x.sum(), x.detach() + 1), "")
    wrong = Contender("wrong", lambda x: (x.sum(), x.detach() + 1.001), "")
    wide = replace(wrong, name="wide", limit=1e-2)
    case = Case("next", "next", {"N": 4}, inputs, (right, wrong, wide), eager=(), formula=right.call)
    assert {n: e["ok"] for n, e in worker.check(case, ["right", "wrong", "wide"]).items()} == {
        "right": True, "wrong": False, "wide": True,
    }  # fmt: skip


def test_a_random_result_is_judged_by_what_must_hold():
    def holds(result, N):
        return None if result.numel() == N else f"{result.numel()} ids"

    case = Case(
        "draw", "draw", {"N": 4}, lambda generator, N: {"N": N},
        (
            Contender("right", lambda N: (torch.randperm(N), "rest"), "", result=lambda output: output[0]),
            Contender("short", lambda N: torch.randperm(N - 1), ""),
            Contender("raises", lambda N: torch.randperm(-N), ""),
        ),
        eager=(), holds=holds,
    )  # fmt: skip
    report = worker.check(case, ["right", "short", "raises"])
    assert report["right"] == {"ok": True} and report["short"] == {"ok": False, "error": "3 ids"}
    assert report["raises"]["error"].startswith("RuntimeError")
    step = case.step("right", case.make_inputs())
    assert step.backward(step.forward()) == ()


def test_fresh_batches_are_copies_which_steps_take_in_turn(monkeypatch):
    monkeypatch.setattr(worker, "FRESH", 500_000)
    case = find("gather_patches-channels_last").tiny()
    made = worker.batches(case)
    size = made[0]["images"].nbytes + made[0]["ids"].nbytes
    assert len(made) == -(-500_000 // size) > 1
    assert len({batch["images"].data_ptr() for batch in made}) == len(made)
    assert all(same(batch["images"], made[0]["images"]) for batch in made)
    assert {batch["images"].stride() for batch in made} == {made[0]["images"].stride()}
    assert len(worker.batches(replace(case, fresh=False))) == 1

    seen = []
    watch = Contender("watch", lambda images, ids, patch_size: seen.append(images.data_ptr()), "")
    step = replace(case, contenders=(watch,)).step("watch", *made)
    for _ in range(len(made) + 1):
        step.backward(step.forward())
    assert len(set(seen)) == len(made) and seen[0] == seen[-1]
    floor = case.step("copy", *made)
    assert len({source.data_ptr() for source in floor.sources}) == len(made)
    assert floor.forward() is floor.forward()  # into one target


def test_copy_floor_moves_as_many_bytes_as_its_case_counts():
    floor = Copy(lambda B, D: {"read x": 4 * B * D, "write y": 12 * B * D})
    step = floor.step({}, {"B": 2, "D": 8})
    copied = step.forward()
    (source,) = step.sources
    assert source.nbytes + copied.nbytes == 16 * 2 * 8 and torch.equal(copied, source)
    assert copied.data_ptr() != source.data_ptr()


def test_gemm_floor_does_the_products():
    inputs = find("info_nce-4096-128").tiny().make_inputs()
    step = find("info_nce-4096-128").tiny().step("gemm", inputs)
    step.backward(step.forward())
    q, k = inputs["query"].detach(), inputs["key"].detach()
    torch.testing.assert_close(step.logits, q @ k.T)
    torch.testing.assert_close(step.gradients[0], q @ k.T @ k)
    torch.testing.assert_close(step.gradients[1], k @ q.T @ q)


def test_the_floor_of_a_search_is_one_product():
    case = find("nearest").tiny()
    inputs = case.make_inputs()
    step = case.step("gemm", inputs)
    step.backward(step.forward())
    torch.testing.assert_close(step.logits, inputs["queries"] @ inputs["keys"].T)
    assert step.gradients == [] and case.floor.describe(case.shape) == {"products": 1}


def test_a_sparse_gradient_is_judged_like_a_dense_one():
    x = torch.eye(3).to_sparse()
    assert worker.relative_error(x, torch.eye(3).double()) == 0.0
    assert worker.relative_error(x, 2 * torch.eye(3).double()) == 0.5


def test_a_nan_in_any_gradient_is_an_error():
    case = find("clip-4096-128").tiny()
    inputs = case.make_inputs()
    sound = case.contender("open_clip")

    def spoilt(text: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        text.register_hook(lambda gradient: gradient * torch.nan)  # the second of three
        return sound.call(text=text, **others)

    expected = worker.exact(case, case.make_inputs(torch.float64))
    for form, ok in ((sound, True), (replace(sound, call=spoilt), False)):
        assert worker.compare(form, ContenderStep(form, inputs, attached=True), *expected)["ok"] is ok


def test_gram_floor_does_the_products():
    case = find("barlow_twins-256-8192").tiny()
    inputs = case.make_inputs()
    step = case.step("gemm", inputs)
    step.backward(step.forward())
    a, b = inputs["z_a"].detach(), inputs["z_b"].detach()
    torch.testing.assert_close(step.gradients, [b @ b.T @ a, a @ a.T @ b])


def test_a_slow_case_takes_fewer_rounds_where_no_goal_is_judged(monkeypatch):
    jobs = []

    def fake(job, environment):
        jobs.append(job)
        return {name: {"ok": True} for name in job.get("names", ())}

    monkeypatch.setattr(runner, "launch", fake)
    for slow, goals in ((True, CASE.goals), (True, ()), (False, ())):
        runner.measure(replace(CASE, slow=slow, goals=goals), runner.Options(memory=False), {})
    assert [job["rounds"] for job in jobs if job["job"] == "time"] == [15, 3, 3, 3, 15, 15]


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
