# SPDX-License-Identifier: Apache-2.0
"""Presets on several ranks give the curve of one process; so does the demo under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import training_cases as cases

from sslkernels.distributed._launch import launched, place
from sslkernels.presets import PRESETS

STEPS = 4


def check(ranks, name, group, *, steps=STEPS, dtype="float64", tolerance=1e-10):
    """In float64 a step's rounding, 1e-16, grows by less than 10 a step in four steps of these networks."""
    if PRESETS[name].data == "news":
        pytest.importorskip("gensim")  # which ships the text
    expected, _ = cases.curve(None, name, steps, dtype)
    (found, state), *others = ranks.run(cases.curve, group, name, steps, dtype)
    assert found == pytest.approx(expected, rel=tolerance)
    for losses, other in others:
        assert losses == found
        for key, x in state.items():
            assert torch.equal(other[key], x), key


# one of each way that rows meet: all features, a queue, sums of products, centres, codes, means of rows and of tokens
@pytest.mark.parametrize("name", ["simclr", "moco", "barlow_twins", "vicreg", "dino", "swav", "clip", "mae", "bert"])
def test_curve_is_that_of_one_process(ranks, name):
    check(ranks, name, "2")


@pytest.mark.parametrize("name", ["moco", "byol", "data2vec"])
def test_batches_that_the_ranks_cannot_share_evenly(ranks, name):
    check(ranks, name, "3", steps=3)


def test_curve_in_float32(ranks):
    check(ranks, "clip", "2", steps=20, dtype="float32", tolerance=1e-4)


def test_a_score_is_that_of_the_method_on_one_process(ranks):
    assert all(ranks.run(cases.scored, "2", "clip"))


@pytest.mark.parametrize("names", [(), ("WORLD_SIZE",), ("RANK",)], ids=str)
def test_one_variable_of_torchrun_alone_starts_nothing(monkeypatch, names):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "2")
    assert place() is None
    with launched() as group:
        assert group is None


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, "-m", "sslkernels.demo", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_demo_under_torchrun(tmp_path):
    out = torchrun("--steps", "3", "--batch-size", "65", "--out", str(tmp_path))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["processes"] == 2 and len(result["sslkernels"]["curve"]) == 3
    # from the eager loss in one process; float32, whose first steps under Adam are signs of gradients
    assert result["largest_difference"] < 1e-3
    assert out.count("largest difference") == 1 and "in 2 processes" in out
