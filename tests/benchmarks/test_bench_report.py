# SPDX-License-Identifier: Apache-2.0
import copy
import json

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import machine, peers, report, runner
from benchmarks.case import Contender
from benchmarks.cases import FAMILIES, README, find

CHOSEN = ("nt_xent-2048-128",)


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_wins_table(results):
    header, rule, row = cells(report.wins([results], CHOSEN))
    assert len(header) == len(rule) == len(row)
    assert row == [
        "`nt_xent` N = 2,048, D = 128", "solo-learn", "8 ms → 2 ms", "**4.0x**", "4.0x", "2.5x", "280 MiB → 6.0 MiB",
    ]  # fmt: skip


def test_wins_table_leaves_out_what_was_not_measured(results):
    del results["cases"]["nt_xent-2048-128"]["time"]["kept"]["sslkernels"]
    assert len(cells(report.wins([results], CHOSEN))) == 2  # header and rule


def test_wins_table_shows_the_chosen_cases_of_every_family(results):
    masks = copy.deepcopy(results)
    (record,) = masks["cases"].values()
    masks["cases"] = {"span_mask": {**record, "op": "span_mask", "variant": "wav2vec 2.0", "memory": {}}}
    masks["cases"]["span_mask"]["provenance"]["commit"] = "fedcba9876543210"
    text = report.wins([results, masks], ("nt_xent-2048-128", "span_mask"))
    first, second = cells(text)[2:]
    assert first[0].startswith("`nt_xent`") and second[0] == "`span_mask` wav2vec 2.0, N = 2,048, D = 128"
    assert second[-1] == "-" and "commit 0123456789, fedcba9876" in text
    assert len(cells(report.wins([results, masks], ("span_mask",)))) == 3


def test_a_case_without_gradient_memory_or_encoder_has_no_such_column(results):
    (record,) = results["cases"].values()
    header, _, ours, *_ = cells(report.times_table(results, "kept"))
    assert header[-2:] == ["peak memory", "share of a step"] and ours[3] == "1 ms"
    record.update(memory={}, images=0)
    for sample in record["time"]["kept"].values():
        sample["backward"] = [1e-7] * 5
    header, _, ours, *_ = cells(report.times_table(results, "kept"))
    assert header[-1] == "time / ours (quartiles)" and ours[3] == "-"


def test_the_bytes_of_a_copy_are_written_out(results):
    (record,) = results["cases"].values()
    assert report.floors(results) == ""
    record["floor"] = {"copy": {"read x": 9_630_000, "write y": 19_270_000}}
    assert report.floors(results).endswith("D = 128: read x 9.6 + write y 19.3 = 28.9 MB.")
    assert report.floors(results) in report.full(results)


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
    assert command.main(["--list", "masks", "ema"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "random_mask" in names and "ema_update-float32" in names and "nt_xent-2048-128" not in names
    assert command.main(["--list", "--case", "span_mask"]) == 0
    assert capsys.readouterr().out == "span_mask\n"
    with pytest.raises(SystemExit):
        command.main(["maks"])
    assert "got 'maks'" in capsys.readouterr().err


def test_cases_have_names_of_their_own_and_the_readme_shows_some():
    names = [case.name for cases in FAMILIES.values() for case in cases]
    assert len(set(names)) == len(names) and set(README) <= set(names)


@pytest.mark.parametrize("case", [case for cases in FAMILIES.values() for case in cases], ids=lambda case: case.name)
def test_cases_are_judged_and_compare_with_what_they_have(case):
    names = [c.name for c in case.contenders]
    assert len(set(names)) == len(names) and names[0] == "sslkernels"
    assert set(case.eager) <= set(names) and (case.formula is None) is not (case.holds is None)
    assert {goal.against for goal in case.goals} <= {*names, *case.floors(), "eager"}
    assert not case.floor or all(count > 0 for count in case.floor.describe(case.shape).values())


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


def test_a_peer_that_draws_alike_gives_the_same_masks(monkeypatch):
    case = find("span_mask").tiny()
    restated = case.contender("transformers")
    said: list[str] = []
    for more, agree in ((0, True), (1, False)):  # one number drawn before
        real = peers.Peer(
            "math", lambda m, i, n=more: (np.random.rand(n), restated.result(restated.call(**i)))[1]  # noqa: NPY002
        )  # fmt: skip
        monkeypatch.setattr(peers, "PEERS", {restated.call: real})
        assert peers.compare([case], said.append) is agree
    assert "same" in said[0] and "DIFFERENT" in said[1]


def test_a_peer_that_does_not_import_is_named(monkeypatch):
    case = find("nt_xent-32-128").tiny()
    monkeypatch.setattr(
        peers, "PEERS", {case.contender("lightly").call: peers.Peer("no_such_package.loss", lambda m, i: m)}
    )
    said: list[str] = []
    assert peers.compare([case], said.append)
    assert "no_such_package.loss does not import" in said[0]
