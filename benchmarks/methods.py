# SPDX-License-Identifier: Apache-2.0
"""`make methods`: train every method for a minute on real data; what it learns, how fast, and where the time goes.

Writes a table and a plot under benchmarks/results/. `--docs` puts the table into docs/methods.md as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, report
from sslkernels.presets import PRESETS
from sslkernels.training import TITLES, Training, steps_in

FOLDER = machine.ROOT / "benchmarks" / "results"
FORM = 1  # of the results file; records of another form are measured again
NAMESPACE = "sslkernels::"
# Scores with a column of their own; their place, label and colour in the plot.
STYLES = {"knn": (-0.13, "kNN", "#1f77b4"), "probe": (0.13, "linear probe", "#d95f02")}


def share_of_primitives(training: Training, *, warm: int = 3, steps: int = 10) -> float:
    """The part of a training step that is spent inside our ops, forward, backward, masks and moving averages.

    torch's profiler records every op of the namespace from its entry into the dispatcher to its return, what it calls
    included: counted are those that no other op of ours encloses. A backward of ours is an op too; what autograd does
    around it is not counted, nor are the checks before an op is entered. The whole is the same steps' wall time, with
    the batch and the optimizer, under the profiler, whose own cost falls on the many small ops of the network.
    """
    training.run(warm)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports its own start and stop
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        training.run(steps)
        seconds = time.perf_counter() - started
    return 1e-6 * sum(event.time_range.elapsed_us() for event in recorded.events() if _outermost(event)) / seconds


def _outermost(event: Any) -> bool:
    if not event.name.startswith(NAMESPACE):
        return False
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(NAMESPACE):
            return False
        parent = parent.cpu_parent
    return True


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Train the preset for about `seconds`; the record that the table is made from."""
    share = share_of_primitives(Training(name, steps=100))
    training = Training(name, steps=steps_in(name, seconds))
    before = training.accuracy()
    started = time.perf_counter()
    losses = training.run(progress=True)
    elapsed = time.perf_counter() - started
    tail = max(1, len(losses) // 20)
    return {
        "data": training.preset.data,
        "batch_size": training.preset.batch_size,
        "parameters": sum(p.numel() for p in training.method.parameters() if p.requires_grad),
        "steps": len(losses),
        "seconds": elapsed,
        "steps_per_second": len(losses) / elapsed,
        "loss": [sum(losses[:tail]) / tail, sum(losses[-tail:]) / tail],
        "before": before,
        "after": training.accuracy(),
        "share": share,
    }


def load(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The results of this machine so far, or none."""
    if path.exists():
        results = json.loads(path.read_text())
        if results.get("form") == FORM and results["machine"]["name"] == described["name"]:
            return results
    return {"form": FORM, "machine": described, "methods": {}}


def table(results: dict[str, Any]) -> str:
    rows = []
    for name, r in results["methods"].items():
        change = {how: f"{100 * r['before'][how]:.0f} → **{100 * r['after'][how]:.0f}**" for how in r["after"]}
        others = [f"{TITLES[how]}: {change[how]}" for how in change if how not in STYLES]
        rows.append([
            f"`{name}`", r["data"], f"{r['parameters'] / 1e3:,.0f}k", f"{r['batch_size']}", f"{r['steps']:,}",
            f"{r['steps_per_second']:.1f}", f"{r['loss'][0]:.3g} → {r['loss'][1]:.3g}",
            *(change.get(how, "-") for how in STYLES), "; ".join(others) or "-",
            f"{100 * r['share']:.1f}%",
        ])  # fmt: skip
    header = ["method", "data", "parameters", "batch", "steps", "steps a second", "loss", "kNN, %", "linear probe, %",
              "other score", "in our primitives"]  # fmt: skip
    return report.table(header, rows, right=2)


def text(results: dict[str, Any], picture: str | None) -> str:
    described, made = results["machine"], [r["provenance"] for r in results["methods"].values()]
    commits = sorted({(p["commit"] or "unknown")[:10] + " with uncommitted changes" * p["dirty"] for p in made})
    facts = sorted({f"torch {p['torch']}, {p['threads']} threads, kernels for {p['instruction_set']}" for p in made})
    seconds = sorted(r["seconds"] for r in results["methods"].values())
    lines = (
        f"{described['cpu']}, {described['cores']} cores; {'; '.join(facts)}; {sorted({p['date'] for p in made})[-1]}, "
        f"commit {', '.join(commits)}; {seconds[0]:.0f} to {seconds[-1]:.0f} seconds of training each."
    )
    return "\n\n".join([lines, *([f"![before and after]({picture})"] if picture else []), table(results)])


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy before and after, and the share of our primitives."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = results["methods"]
    rows = range(len(records))
    figure, (gain, share) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.4 * len(records)), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    labels = {}
    for row, record in zip(rows, records.values(), strict=True):
        for how in record["after"]:
            offset, label, colour = STYLES.get(how, (0.0, "another score", "#7570b3"))
            ends = [100 * record[when][how] for when in ("before", "after")]
            gain.plot(ends, [row + offset] * 2, color=colour, alpha=0.5, zorder=1)
            gain.scatter(ends[:1], [row + offset], s=28, facecolors="white", edgecolors=colour, zorder=2)
            labels[label] = gain.scatter(ends[1:], [row + offset], s=28, color=colour, zorder=2)
    gain.set_yticks(list(rows), [f"{name} ({record['data']})" for name, record in records.items()])
    gain.invert_yaxis()
    gain.set_xlabel("held-out, %: hollow before, full after")
    gain.grid(axis="x", alpha=0.3)
    gain.legend(labels.values(), labels, loc="lower left", fontsize="small")
    bars = share.barh(list(rows), [100 * record["share"] for record in records.values()], color="#2ca02c")
    share.bar_label(bars, fmt="%.1f", padding=3)
    share.margins(x=0.15)
    share.set_xlabel("% of a step in our primitives")
    seconds = sorted(record["seconds"] for record in records.values())[len(records) // 2]
    described = results["machine"]
    figure.suptitle(f"Every method, about {seconds:.0f} seconds each, {described['cpu']}, {described['cores']} cores")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def publish(path: Path, *, docs: bool) -> None:
    results = json.loads(path.read_text())
    picture = path.with_suffix(".png")
    draw(results, picture)
    path.with_suffix(".md").write_text(text(results, picture.name) + "\n")
    if docs:
        link = f"../benchmarks/results/{picture.name}"
        report.insert(machine.ROOT / "docs" / "methods.md", "figures", text(results, link))
    print(f"\n{table(results)}\n\nwritten: {path.name} and what is made from it, in benchmarks/results/")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of training, each method (default 60)")
    parser.add_argument("--only", action="append", choices=PRESETS, help="only this method; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="2 seconds each, into a file that is not committed")
    parser.add_argument("--report", action="store_true", help="measure nothing: table and plot again from the file")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/methods.md")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    path = FOLDER / f"methods{'-quick' if options.quick else ''}.json"
    if not options.report:
        torch.set_num_threads(options.threads)
        results = load(path, machine.describe())
        provenance = machine.provenance(options.threads, arguments, "benchmarks.methods")
        for name in options.only or PRESETS:
            record = measure(name, 2 if options.quick else options.seconds)
            results["methods"][name] = {**record, "provenance": provenance}
            results["methods"] = {n: results["methods"][n] for n in PRESETS if n in results["methods"]}
            path.write_text(json.dumps(results, indent=1) + "\n")  # after each: a run that is stopped keeps its figures
    publish(path, docs=options.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
