# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of what was measured and of what is predicted, for docs/scaling.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import duration, machine_line, mebibytes, table
from benchmarks.scaling.cases import ALONE, APART, FEWER
from benchmarks.scaling.counting import EXCHANGE
from benchmarks.scaling.measure import WORLD, WORLDS
from benchmarks.scaling.model import Estimate, Link, Measured, estimate, halves
from benchmarks.scaling.predict import GPUS, SHAPES, STRATEGIES, predicted
from benchmarks.stats import Summary, seconds, summary

KINDS = ("swap", "gather", "scatter", "exchange", "sum")


def ratio(times: dict[str, Any], over: str, name: str) -> Summary:
    """Of the times of each round."""
    pairs = zip(seconds(times, over), seconds(times, name), strict=True)
    return summary([a / b for a, b in pairs])


def title(case: dict[str, Any]) -> str:
    return f"`{case['loss']}` n = {case['n']:,}, D = {case['D']:,}"


def times_table(results: dict[str, Any]) -> str:
    rows = []
    for case in results["cases"].values():
        times = case["time"]
        alone, fewer = (summary(times[name]["processor"]).median for name in (ALONE, FEWER))
        for name in (FEWER, ALONE, APART, *(x for x in times if x not in (FEWER, ALONE, APART))):
            total, busy = summary(seconds(times, name)), summary(times[name]["processor"])
            strong = ratio(times, ALONE, name)
            spread = f"{strong.median:.2f}x ({strong.low:.2f}-{strong.high:.2f})"
            rows.append([
                title(case) if name == FEWER else "",
                name,
                f"{duration(busy.median)} ({duration(busy.low)}-{duration(busy.high)})",
                *(["", "", ""] if name in (ALONE, FEWER) else [
                    f"{100 * alone / (WORLD * busy.median):.0f}%",
                    f"{busy.median / fewer:.2f}x",
                    spread,
                ]),
                f"{duration(total.median)} ({duration(total.low)}-{duration(total.high)})",
                duration(summary(times[name]["forward"]).median),
                duration(summary(times[name]["backward"]).median),
            ])  # fmt: skip
    header = ["rows of a rank", "who", "processor, a rank (quartiles)", "strong: of one process' share",
              "weak: over one rank's rows", "one process' time / this", "time (quartiles)", "forward",
              "backward"]  # fmt: skip
    return table(header, rows, right=2)


def memory_table(results: dict[str, Any]) -> str:
    rows = []
    for case in results["memory"].values():
        for name, peaks in case["peaks"].items():
            cells = [mebibytes(peaks.get(str(world))) for world in WORLDS]
            rows.append([title(case) if name == next(iter(case["peaks"])) else "", name, *cells])
    return table(["rows of a rank", "who", *(f"{w} process{'es' * (w > 1)}" for w in WORLDS)], rows, right=2)


def bytes_table(results: dict[str, Any]) -> str:
    rows = []
    for found in (row for rows in results["bytes"].values() for row in rows):
        counted, formula = (f"{a:,.0f} + {b:,.0f}" for a, b in (found["counted"], found["formula"]))
        cells = [counted, formula, f"{found['compared']:,}"]
        rows.append([f"`{found['loss']}`", found["strategy"], str(found["world"]), *cells])
    header = ["loss", "strategy", "ranks", "counted, forward + backward", "by formula", "comparing what ranks bring"]
    return table(header, rows, right=2)


def fitted(points: list[list[float]]) -> Link:
    """Latency and bandwidth, from (bytes, seconds), with the least squares of relative errors."""
    w = [(1 / t, sent / t) for sent, t in points]
    aa, ab, bb = sum(a * a for a, _ in w), sum(a * b for a, b in w), sum(b * b for _, b in w)
    a, b = sum(a for a, _ in w), sum(b for _, b in w)
    det = aa * bb - ab * ab
    latency, per_byte = max(0.0, (a * bb - b * ab) / det), (aa * b - ab * a) / det
    return Link(latency, 1 / per_byte)


def link(results: dict[str, Any], kind: str, *, processor: bool) -> Link:
    return fitted([[sent, busy if processor else passed] for sent, passed, busy in results["links"][kind]])


def foretold(results: dict[str, Any], case: dict[str, Any], strategy: str) -> float:
    """What a rank's threads are busy for: products at the rate of processes apart, and what transfers cost them."""
    apart, work = case["time"][APART], halves(case["loss"], case["n"], case["D"], 4, WORLD)
    # apart, a rank has as many products as in the loss over all of them
    one = Measured({}, {"forward": 1.0, "backward": 1.0})  # an operation a second
    rate = sum(half.arithmetic(one, WORLD) for half in work) / summary(apart["processor"]).median
    links = {kind: link(results, kind, processor=True) for kind in KINDS}
    machine = Measured(links, {"forward": rate, "backward": rate}, overlap=0.0)
    compared = machine.seconds("gather", EXCHANGE * (WORLD - 1), WORLD)
    return compared + estimate(work, machine, strategy, WORLD).seconds


def errors_table(results: dict[str, Any]) -> str:
    rows = []
    for case in results["cases"].values():
        for strategy in (s for s in STRATEGIES if s in case["time"]):
            took, told = summary(case["time"][strategy]["processor"]).median, foretold(results, case, strategy)
            cells = [duration(told), duration(took), f"{100 * (told / took - 1):+.0f}%"]
            rows.append([title(case) if strategy == "gather" else "", strategy, *cells])
    return table(["rows of a rank", "strategy", "processor of a rank, foretold", "measured", "error"], rows, right=2)


def links_table(results: dict[str, Any]) -> str:
    rows = []
    for kind in KINDS:
        both = [link(results, kind, processor=processor) for processor in (False, True)]
        rows.append([kind, *(f"{x.latency * 1e6:.0f} us, {x.bandwidth / 1e9:.2f} GB/s" for x in both)])
    header = ["two processes of this machine, gloo", "latency, bytes that a rank sends", "the same by processor time"]
    there = f"{100 * results['arrived']:.0f}%"
    said = f"Of swaps of 4 MiB that began before 0.1 s of arithmetic, {there} had arrived at its end, before a wait."
    return f"{table(header, rows)}\n\n{said}"


def predicted_table() -> str:
    def cells(found: dict[str, Estimate]) -> list[str]:
        best = found["gather"]
        return [
            duration(best.arithmetic),
            *(duration(found[s].seconds) for s in STRATEGIES),
            f"{best.sent / 2**20:,.0f} / {found['ring'].sent / 2**20:,.0f} MiB",
            f"{best.memory / 2**20:,.0f} / {found['ring'].memory / 2**20:,.0f} MiB",
        ]

    rows = []
    for shape in SHAPES:
        for world in GPUS:
            name = f"`{shape.loss}` n = {shape.n:,}, D = {shape.D:,}" if world == GPUS[0] else ""
            rows.append([name, f"{world:,}", *cells(predicted(shape, world))])
    header = ["rows of a GPU, bfloat16", "GPUs", "arithmetic", *(f'"{s}"' for s in STRATEGIES),
              "sent by a GPU, gather / ring", "memory, gather / ring"]  # fmt: skip
    return table(header, rows, right=1)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By the marker of their place in docs/scaling.md; what was not measured has no table."""
    load = [case["load"] for case in results["cases"].values()]
    line = machine_line(results["machine"], [results])
    busy = f"Load average, these processes included: {min(load):.0f} to {max(load):.0f}." if load else ""
    made = {"bytes": bytes_table(results), "memory": memory_table(results), "time": times_table(results)}
    made["time"] = f"{line} {busy}\n\n{made['time']}"
    if "links" in results:
        made |= {"links": links_table(results), "errors": errors_table(results)}
    return made


def draw_memory(results: dict[str, Any], path: Path) -> None:
    plt = _pyplot()
    cases = list(results["memory"].values())
    figure, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 3.8), squeeze=False)
    for axis, case in zip(axes[0], cases):
        for name, peaks in case["peaks"].items():
            style = "-" if name in STRATEGIES else "--"
            axis.plot(WORLDS, [peaks[str(world)] for world in WORLDS], style, marker="o", label=name)
        axis.set_title(f"{case['loss']}, {case['n']} rows of {case['D']} a rank", fontsize="medium")
        axis.set_xlabel("processes")
        axis.set_ylabel("peak memory of a rank's step, MiB")
        axis.set_xticks(WORLDS)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small", frameon=False)
    _save(figure, path)


def draw_predicted(path: Path) -> None:
    plt = _pyplot()
    worlds = [2**i for i in range(1, 13)]
    figure, axes = plt.subplots(2, len(SHAPES), figsize=(4 * len(SHAPES), 6.4), sharex=True, squeeze=False)
    for column, shape in enumerate(SHAPES):
        found = [predicted(shape, world) for world in worlds]
        top, bottom = axes[0, column], axes[1, column]
        top.plot(worlds, [f["gather"].arithmetic * 1e3 for f in found], ":", color="#444", label="arithmetic alone")
        for strategy in STRATEGIES:
            top.plot(worlds, [f[strategy].seconds * 1e3 for f in found], label=strategy)
        for strategy in STRATEGIES[:2]:
            bottom.plot(worlds, [f[strategy].memory / 2**20 for f in found], label=strategy)
        for axis in (top, bottom):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.axvline(8, color="#ddd", linewidth=4, zorder=0)
        top.set_title(f"{shape.loss}, n = {shape.n:,}, D = {shape.D:,}", fontsize="medium")
        bottom.set_xlabel("GPUs (one node up to the grey line)")
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("memory of a GPU, MiB")
    axes[0, 0].legend(fontsize="small", frameon=False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
