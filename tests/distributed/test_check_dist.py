# SPDX-License-Identifier: Apache-2.0
"""The verdicts of check-dist on losses that are right, and on those that go wrong as well-known ones do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import check_dist_cases as cases
import pytest

from sslkernels import __main__, check_dist, losses
from sslkernels.audit import Finding, Inputs

ALL = {"process_group": "world"}
HEAD = ["loss", "cosine", "norm", "ratio", "features", "verdict"]


def found(target, arguments=None, inputs="auto", world=2, **options) -> Finding:
    (finding,) = check_dist(target, inputs, arguments=arguments, processes=[world], **options).findings
    return finding


@pytest.mark.parametrize(
    "target, arguments",
    [
        (losses.NTXentLoss, {"gather_distributed": True}),
        (losses.nt_xent, {**ALL, "strategy": "ring"}),
        (losses.ClipLoss, ALL),
        (losses.SigLipLoss, ALL),
        (losses.SupConLoss, ALL),
        (cases.Learned, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_ours(target, arguments):
    finding = found(target, arguments, world=3, uneven=True)
    assert finding.verdict == "exact" and finding.exact
    assert abs(finding.loss / finding.true_loss - 1) < 1e-12 and abs(finding.ratio - 1) < 1e-10


@pytest.mark.parametrize("world", [2, 4])
def test_flags_of_open_clip(world):
    """The four pairs of flags, as methods of the field are known to be."""
    default = found(cases.Clip, {}, world=world)
    assert default.loss == pytest.approx(default.true_loss) and default.cosine == pytest.approx(1)
    assert default.ratio == pytest.approx(1 / world)
    assert f"linear.weight is 1/{world} of the true one (1/world), that of logit_scale is exact" in default.verdict
    for own_rows in (False, True):
        assert found(cases.Clip, {"own_rows": own_rows, "gradient": True}, world=world).exact
    half = found(cases.Clip, {"own_rows": True}, world=world)
    assert half.loss == pytest.approx(half.true_loss) and half.cosine < 0.999
    assert "wrong direction" in half.verdict and "the key side is missing" in half.verdict


def test_barlow_twins():
    right = found(cases.Barlow, {"statistics": "all", "gradient": True})
    assert right.exact
    original = found(cases.Barlow, {"statistics": "all", "gradient": False})
    assert original.ratio == pytest.approx(0.5) and original.features_cosine == pytest.approx(1)
    assert original.verdict == "the gradient is 1/2 of the true one (1/world): multiply the loss by 2"
    for gradient in (True, False):  # lightly 1.6, solo-learn
        own = found(cases.Barlow, {"statistics": "own", "gradient": gradient})
        assert own.verdict.startswith("the loss is") and own.cosine < 0.99
        assert "wrong direction" in own.verdict and "of the rank's own batch" in own.verdict


def test_scale():
    finding = found(cases.world_times)
    assert finding.verdict == (
        "the loss is 2 times the true one; the gradient is 2 times the true one (world): divide the loss by 2"
    )
    assert found(cases.moco).exact


def test_not_synchronised():
    assert found(losses.NTXentLoss).verdict == "not synchronised: each rank computes the loss of its own batch"
    assert found(losses.NegativeCosineSimilarity).exact  # which no other row touches
    assert found(losses.NegativeCosineSimilarity, uneven=True).verdict.startswith("ranks count equally, not their rows")


@pytest.mark.parametrize(
    "target, arguments",
    [
        (cases.with_temperature, {"temperature": 0.5}),
        (cases.with_rank, {}),
        (cases.makes_function, {}),
        (cases.named, {"whole": True}),
        (cases.named, {"whole": False}),
    ],
)
def test_inputs_are_told_by_what_is_left_to_give(target, arguments):
    assert found(target, arguments).exact


def test_state():
    assert found(cases.Centred, steps=1).exact
    assert not found(cases.Centred, steps=2).exact


def test_gradient_that_one_process_lacks():
    finding = found(cases.Leak)
    assert finding.parameter == "loss.weight" and finding.verdict == "the gradient of loss.weight should be zero"


def test_a_module_and_own_inputs():
    assert found(losses.NTXentLoss(gather_distributed=True), inputs=cases.own_inputs).exact
    assert found("check_dist_cases:moco", inputs=Inputs(cases.triples, cases.three)).exact


def test_stopped():
    assert found(cases.fails).verdict == "stopped: rank 1 raised FloatingPointError: too warm"
    assert re.match(r"stopped: rank \d (was aborted, as by gloo|raised)", found(cases.collides, uneven=True).verdict)
    assert found(cases.exits).verdict == "stopped: rank 1 raised SystemExit: 3"
    assert found(cases.ends).verdict == "stopped: rank 1 ended with code 3"
    assert "rank 0 raised TypeError" in found(cases.Clip, {"nonsense": 1}).verdict


def test_names_the_rule_of_main(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text("from sslkernels import check_dist, losses\ncheck_dist(losses.NTXentLoss, processes=[2])\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r"rank \d ended with code 1 before it began: .* under `if __name__ == .__main__.:`", last), last


def test_refuses():
    with pytest.raises(TypeError, match="another process can import"):
        check_dist(lambda a, b: (a - b).sum())
    with pytest.raises(ValueError, match="inputs must be one of 'auto', 'views'"):
        check_dist(losses.NTXentLoss, "pairs")
    with pytest.raises(ValueError, match="module:name"):
        check_dist("losses.NTXentLoss")
    with pytest.raises(ValueError, match="processes must be at least 2, got 1"):
        check_dist(losses.NTXentLoss, processes=[1])
    with pytest.raises(ValueError, match="processes must not be empty"):
        check_dist(losses.NTXentLoss, processes=[])
    for wrong in (2, "24"):
        with pytest.raises(TypeError, match="processes must be a sequence of integers, got"):
            check_dist(losses.NTXentLoss, processes=wrong)


def test_refuses_one_process_of_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="torchrun must start at least 2 processes, got 1"):
        check_dist(losses.NTXentLoss)


def command(*arguments: str, capsys, monkeypatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["sslkernels", "check-dist", *arguments])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    printed = capsys.readouterr()
    return end.value.code, printed.out + printed.err


def test_command(capsys, monkeypatch, tmp_path):
    run = {"capsys": capsys, "monkeypatch": monkeypatch}
    name, path = "sslkernels.losses:NTXentLoss", tmp_path / "found.json"
    code, printed = command(
        name, "--args", "gather_distributed=True, temperature=0.2", "--processes", "2", "3", "--json", str(path), **run
    )
    head, *lines = printed.splitlines()
    assert code == 0 and head.split() == ["rows", "loss", "true", *HEAD]
    assert [line.split()[0] for line in lines] == ["8+8", "8+8+8"] and all(line.endswith("exact") for line in lines)
    assert [finding["verdict"] for finding in json.loads(path.read_text())] == ["exact", "exact"]
    monkeypatch.setenv("RANK", "1")  # alone, which is not torchrun's
    code, printed = command(name, "--processes", "2", **run)
    assert code == 1 and "not synchronised" in printed
    code, printed = command(name, "--json", str(tmp_path / "nowhere" / "found.json"), **run)
    assert code == 2 and "there is no folder" in printed
    code, printed = command(name, "--inputs", "nowhere:inputs", **run)
    assert code == 2 and "No module named 'nowhere'" in printed
    code, printed = command(name, "--args", "temperature", **run)
    assert code == 2 and "must be like 'a=1, b=True', got 'temperature'" in printed


def test_under_torchrun():
    root = Path(__file__).parents[2]
    launch = [
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "sslkernels",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}

    def status(*arguments: str) -> tuple[int, str]:
        call = [sys.executable, *launch, "check-dist", *arguments]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
        assert ("--processes is ignored" in done.stderr) == ("--processes" in arguments)
        return done.returncode, done.stdout

    code, printed = status("sslkernels.losses:NTXentLoss", "--args", "gather_distributed=True")
    assert code == 0 and printed.rstrip().endswith("exact") and len(printed.splitlines()) == 2
    code, printed = status("check_dist_cases:world_times", "--processes", "3")
    assert code == 1 and "2 times the true one" in printed
