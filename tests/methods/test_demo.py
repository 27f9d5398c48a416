# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslkernels import demo


def test_quick_demo_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "sslkernels.demo", "--quick", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "demo.json").read_text())
    assert len(result["eager"]["curve"]) == len(result["sslkernels"]["curve"]) == result["steps"] == 8
    assert result["largest_difference"] < 1e-4
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for line in ("largest difference", "milliseconds in the loss", "peak memory", "raw pixels", "untrained network"):
        assert line in done.stdout
    assert str(tmp_path / "demo.png") in done.stdout and "make bench" in done.stdout


def test_eager_loss_is_the_formula():
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    z = torch.cat([a, b])
    similarity = (z @ z.T / 0.1).exp()
    rows = [similarity[i, (i + 5) % 10] / (similarity[i].sum() - similarity[i, i]) for i in range(10)]
    torch.testing.assert_close(demo.eager_nt_xent(a, b, 0.1), -torch.stack(rows).log().mean())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory here")
def test_peak_memory_finds_the_matrices():
    """At 1,024 pairs the eager form holds the (2,048, 2,047) logits and their gradient: 16 MiB each at the least."""
    eager = demo.peak_memory("eager", 1024)
    assert eager is not None and eager > 32
    assert demo.peak_memory("sslkernels", 1024) < eager / 2


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "1"], ["--batch-size", "2000"]])
def test_refuses(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_table_without_a_memory_figure():
    side = {"curve": [2.0, 1.0], "loss_ms": 2.0, "step_ms": 4.0, "peak_mib": None, "knn": 90.0}
    result = {"eager": side, "sslkernels": {**side, "loss_ms": 1.0}, "largest_difference": 0.0}
    text = demo.table({**result, "knn_raw_pixels": 80.0, "knn_untrained": 70.0})
    assert "not measured" in text and "2.0x less" in text


def test_one_method(tmp_path, capsys):
    demo.main(["--method", "simsiam", "--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "simsiam.json").read_text())
    assert len(result["curve"]) == result["steps"] == 8 and result["data"] == "digits"
    assert 0 < result["before"]["knn"] < 1 and 0 < result["after"]["probe"] < 1
    assert (tmp_path / "simsiam.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for part in ("kNN accuracy", "linear probe", "untrained", f"{tmp_path / 'simsiam.png'}", "make methods"):
        assert part in out


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seconds", "0"]])
def test_one_method_refuses(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--method", "moco", *arguments])
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]
