# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import machine, methods
from sslkernels.training import Training


@pytest.fixture
def record():
    return {
        "data": "digits",
        "batch_size": 128,
        "parameters": 20_400,
        "steps": 1234,
        "seconds": 61.0,
        "steps_per_second": 20.25,
        "loss": [17.2, 4.56],
        "before": {"knn": 0.76, "probe": 0.89},
        "after": {"knn": 0.985, "probe": 0.99},
        "share": 0.0312,
        "provenance": {
            "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02", "torch": "2.13.0", "threads": 2,
            "instruction_set": "avx512",
        },
    }  # fmt: skip


@pytest.fixture
def results(record):
    described = {"name": "a", "cpu": "A CPU", "cores": 2}
    return {"form": methods.FORM, "machine": described, "methods": {"simclr": record, "moco": {**record, "steps": 9}}}


def test_table_and_text(results):
    text = methods.text(results, "methods.png")
    assert (
        "| `simclr` | digits | 20k | 128 | 1,234 | 20.2 | 17.2 → 4.56 | 76 → **98** | 89 → **99** | - | 3.1% |" in text
        and "| `moco` | digits | 20k | 128 | 9 |" in text
    )
    for part in ("A CPU, 2 cores", "torch 2.13.0, 2 threads", "commit 0123456789;", "![before and after](methods.png)"):
        assert part in text
    assert "uncommitted" not in text


def test_methods_with_scores_of_their_own(results, record, tmp_path, monkeypatch):
    """A score without a column goes into the last one, and a method without a column's score has none there."""
    monkeypatch.setitem(methods.TITLES, "sense", "sense, %")
    results["methods"]["other"] = {**record, "before": {"sense": 0.02}, "after": {"sense": 0.125}}
    assert "| - | - | sense, %: 2 → **12** | 3.1% |" in methods.table(results)
    methods.draw(results, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_share_counts_the_outermost_ops_once():
    class Event:
        def __init__(self, name, parent=None):
            self.name, self.cpu_parent = name, parent

    step = Event("aten::mm")
    ours = Event("sslkernels::nt_xent", step)
    inner = Event("sslkernels::inner", Event("aten::add", ours))
    assert [methods._outermost(event) for event in (step, ours, inner)] == [False, True, False]


def test_share_is_of_the_wall_time(monkeypatch):
    """A step that is nothing but our op, and one that also waits: the share follows."""
    from sslkernels.ops import ema_update_

    class Fake:
        pause = 0.0

        def run(self, steps):
            for _ in range(steps):
                ema_update_(self.targets, self.sources, 0.5)
                methods.time.sleep(self.pause)

    fake = Fake()
    fake.targets, fake.sources = [torch.zeros(2**22)], [torch.ones(2**22)]
    alone = methods.share_of_primitives(fake)
    fake.pause = 0.05
    waiting = methods.share_of_primitives(fake)
    assert 0 < waiting < alone <= 1


def test_profiler_sees_the_ops_of_a_step():
    share = methods.share_of_primitives(Training("moco", steps=20), warm=1, steps=3)
    assert 0 < share < 0.9


def test_runs_keep_the_other_methods_figures(results, record, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    described = machine.describe()
    path = tmp_path / "methods.json"
    path.write_text(json.dumps({**results, "machine": described}))
    monkeypatch.setattr(methods, "FOLDER", tmp_path)
    monkeypatch.setattr(methods, "measure", lambda name, seconds: {**record, "steps": 7})
    before = torch.get_num_threads()
    try:
        assert methods.main(["--only", "simclr", "--seconds", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(before)
    written = json.loads(path.read_text())["methods"]
    assert {name: r["steps"] for name, r in written.items()} == {"simclr": 7, "moco": 9}
    assert (
        written["simclr"]["provenance"]["command"]
        == "python -m benchmarks.methods --only simclr --seconds 1 --threads 1"
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "`simclr`" in path.with_suffix(".md").read_text()
    assert str(tmp_path) not in capsys.readouterr().out
    assert methods.load(path, {**described, "name": "another"})["methods"] == {}
