# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from benchmarks import __main__ as command
from benchmarks import machine, peers, report, runner
from benchmarks.case import Contender
from benchmarks.cases import find


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_wins_table(results):
    header, rule, row = cells(report.wins(results))
    assert len(header) == len(rule) == len(row)
    assert row == [
        "`nt_xent` N = 2,048, D = 128", "solo-learn", "8 ms → 2 ms", "**4.0x**", "4.0x", "2.5x", "280 MiB → 6.0 MiB",
    ]  # fmt: skip


def test_wins_table_leaves_out_what_was_not_measured(results):
    del results["cases"]["nt_xent-2048-128"]["time"]["kept"]["sslkernels"]
    assert len(cells(report.wins(results))) == 2  # header and rule


def test_full_report_names_machine_commit_and_sources(results):
    text = report.full(results, "picture.png")
    parts = [
        "A CPU, 2 cores, L2 2 MiB",
        "torch 2.13.0 (mkl), 2 threads",
        "commit 0123456789",
        "lightly: lightly's file",
    ]
    for part in [*parts, "![speed and memory](picture.png)", "### Memory kept", "### malloc default", "MISSED"]:
        assert part in text
    assert "uncommitted" not in text
    results["cases"]["nt_xent-2048-128"]["provenance"]["dirty"] = True
    assert "with uncommitted changes" in report.full(results)


def test_share_of_a_step(results):
    case = results["cases"]["nt_xent-2048-128"]
    # 12 ms of loss beside 4,096 images at 1 us.
    assert report.share_of_step(results, case, "lightly", "kept") == pytest.approx(0.012 / (0.012 + 0.004096))
    assert report.share_of_step(results, case, "lean+compile", "kept") is None


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 us"), (0.25, "250 ms")]
)
def test_duration(value, text):
    assert report.duration(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "< 1 MiB"), (6.04, "6.0 MiB"), (1234.5, "1,234 MiB")])
def test_mebibytes(value, text):
    assert report.mebibytes(value) == text


def test_replace_between_markers():
    text = "a\n<!-- wins:begin -->\nold\n<!-- wins:end -->\nb\n"
    once = report.replace_between(text, "wins", "new")
    assert once == "a\n<!-- wins:begin -->\nnew\n<!-- wins:end -->\nb\n"
    assert report.replace_between(once, "wins", "new") == once
    with pytest.raises(ValueError, match="expected the markers"):
        report.replace_between("no markers", "wins", "new")


def test_progress_lines(results):
    text = "\n".join(report.progress(results["cases"]["nt_xent-2048-128"]))
    assert "sslkernels 2 ms; lightly 12 ms (6.00x)" in text and "≥ 6x lightly: 6.00x (6.00-6.00), met" in text


def test_dump_is_json_with_samples_on_one_line(results):
    text = runner.dump(results)
    assert json.loads(text) == runner.rounded(results)
    assert '"forward": [0.004, 0.004, 0.004, 0.004, 0.004],' in text
    assert runner.rounded({"a": [1.23456, 7]}) == {"a": [1.235, 7]}


def test_records_of_other_cases_are_kept_unless_the_file_is_of_another_form_or_machine(results, tmp_path):
    path = tmp_path / "contrastive-a.json"
    assert runner.load(path, "contrastive")["cases"] == {}
    results.update(form=runner.FORM, machine=machine.describe())
    for change, kept in (({}, True), ({"form": 0}, False), ({"machine": {"name": "another"}}, False)):
        path.write_text(runner.dump({**results, **change}))
        assert bool(runner.load(path, "contrastive")["cases"]) is kept


def test_report_command_writes_table_and_plot_from_the_file(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "contrastive-a.json"
    path.write_text(runner.dump(results))
    assert command.main(["report", "--plot", str(path)]) == 0
    assert "### Goals" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in capsys.readouterr().out  # no path of this machine in what people paste


def test_list_names_the_cases(capsys):
    assert command.main(["contrastive", "--list"]) == 0
    assert "nt_xent-2048-128" in capsys.readouterr().out.splitlines()


def test_machine_is_described_without_paths():
    described = machine.describe()
    assert described["cores"] >= 1 and "/" not in described["name"] and " " not in described["name"]


def test_peers_are_restated_contenders_and_a_difference_is_seen(monkeypatch):
    case = find("nt_xent-32-128").tiny()
    lightly = case.contender("lightly")
    assert lightly.call in peers.PEERS
    said: list[str] = []
    for factor, agree in ((1.0, True), (1.01, False)):
        real = peers.Peer("math", lambda m, i, f=factor: f * Contender("x", lightly.call, "").call(**i))
        monkeypatch.setattr(peers, "PEERS", {lightly.call: real})
        assert peers.compare([case], said.append) is agree
    assert "same" in said[0] and "no package to import" in said[1] and "DIFFERENT" in said[2]


def test_a_peer_that_does_not_import_is_named(monkeypatch):
    case = find("nt_xent-32-128").tiny()
    monkeypatch.setattr(
        peers, "PEERS", {case.contender("lightly").call: peers.Peer("no_such_package.loss", lambda m, i: m)}
    )
    said: list[str] = []
    assert peers.compare([case], said.append)
    assert "no_such_package.loss does not import" in said[0]
