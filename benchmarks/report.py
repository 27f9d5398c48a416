# SPDX-License-Identifier: Apache-2.0
"""Tables made from a results file: for the terminal, for docs/benchmarks.md, and the short one in the README."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from benchmarks.stats import OURS, Verdict, fastest, judge, seconds, speedup, summary

BLURRED = 1.0  # MiB; peak memory below this is noise
FLOORS = ("gemm", "copy")
NOTHING = 1e-5  # seconds; a backward shorter than this only returned: autograd alone takes longer


def duration(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def mebibytes(value: float | None) -> str:
    if value is None:
        return "-"
    if value < BLURRED:
        return f"< {BLURRED:g} MiB"
    return f"{value:,.0f} MiB" if value >= 10 else f"{value:.1f} MiB"


def share_of_step(results: dict[str, Any], record: dict[str, Any], name: str, regime: str) -> float | None:
    """The part of a training step that the loss takes, beside the reference encoder."""
    if not results.get("encoder") or not record["images"] or name not in record["time"].get(regime, {}):
        return None
    loss = summary(seconds(record["time"][regime], name)).median
    return loss / (loss + record["images"] * results["encoder"]["seconds_per_image"])


def verdicts(record: dict[str, Any], regime: str) -> list[Verdict]:
    return [judge(record, goal, regime) for goal in record["goals"]]


def mark(verdict: Verdict) -> str:
    return {True: "met", False: "MISSED", None: "?"}[verdict.met]


def progress(record: dict[str, Any]) -> list[str]:
    """What the runner prints when a case is done."""
    lines = []
    for regime, times in record["time"].items():
        ours = f"{duration(summary(seconds(times, OURS)).median)}" if OURS in times else "not measured"
        others = [
            f"{name} {duration(summary(seconds(times, name)).median)}"
            + (f" ({speedup(times, name).median:.2f}x)" if OURS in times else "")
            for name in times
            if name != OURS
        ]
        lines.append(f"{regime:8}{OURS} {ours}; " + "; ".join(others))
    if record["memory"]:
        lines.append("memory  " + "; ".join(f"{name} {mebibytes(peak)}" for name, peak in record["memory"].items()))
    regime = next(iter(record["time"]), "kept")
    lines += [f"goal    {v.goal}: {v.got}, {mark(v)}" for v in verdicts(record, regime)]
    return lines


def table(header: list[str], rows: list[list[str]], right: int = 1) -> str:
    """A Markdown table; columns from `right` on are aligned to the right."""
    rule = ["---" if i < right else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def title(record: dict[str, Any]) -> str:
    sizes = (f"{k} = {v:,}" for k, v in record["shape"].items())
    return f"`{record['op']}` {', '.join(filter(None, (record.get('variant'), *sizes)))}"


def times_table(results: dict[str, Any], regime: str) -> str:
    records = results["cases"].values()
    weighed, shared = any(r["memory"] for r in records), any(r["images"] for r in records)
    header = ["case", "contender", "forward", "backward", "both (quartiles)", "time / ours (quartiles)"]
    rows = []
    for record in records:
        times = record["time"].get(regime, {})
        for name in times:
            total, backward = summary(seconds(times, name)), summary(seconds(times, name, "backward")).median
            ratio = speedup(times, name) if OURS in times and name != OURS else None
            row = [
                title(record) if name == next(iter(times)) else "",
                name,
                duration(summary(seconds(times, name, "forward")).median),
                duration(backward) if backward > NOTHING else "-",
                f"{duration(total.median)} ({duration(total.low)}-{duration(total.high)})",
                f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "",
            ]
            if weighed:
                row.append(mebibytes(record["memory"].get(name)))
            if shared:
                share = share_of_step(results, record, name, regime) if name not in FLOORS else None
                row.append(f"{100 * share:.1f}%" if share is not None else "-")
            rows.append(row)
    return table(header + ["peak memory"] * weighed + ["share of a step"] * shared, rows, right=2)


def goals_table(results: dict[str, Any]) -> str:
    rows = []
    for record in results["cases"].values():
        for number, goal in enumerate(record["goals"]):
            kept, default = judge(record, goal, "kept"), judge(record, goal, "default")
            other = default.got if goal["what"] == "time" else ""
            rows.append([title(record) if number == 0 else "", kept.goal, kept.got, mark(kept), other])
    return table(["case", "goal", "kept", "", "default malloc"], rows, right=2)


def machine_line(machine: dict[str, Any], records: Iterable[dict[str, Any]]) -> str:
    caches = ", ".join(f"{n.upper()} {size / 1024:g} MiB" for n in ("l2", "l3") if (size := machine[f"{n}_kib"]))
    made = [record["provenance"] for record in records]
    facts = {
        f"torch {p['torch']} ({p['blas']}), {p['threads']} threads, {p['rounds']} rounds, kernels for "
        f"{p['instruction_set']}" for p in made
    }  # fmt: skip
    commits = {(p["commit"] or "unknown")[:10] + " with uncommitted changes" * p["dirty"] for p in made}
    dates = sorted({p["date"] for p in made})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "never"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {caches}; float32; {'; '.join(sorted(facts))}; "
        f"{when}, commit {', '.join(sorted(commits))}."
    )


def times_faster(times: dict[str, Any], than: str) -> str:
    if OURS not in times or than not in times:
        return "-"
    ratio = speedup(times, than).median
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def wins(families: list[dict[str, Any]], chosen: Collection[str]) -> str:
    """The README's table: the chosen cases of one machine, against the fastest form that anyone ships."""
    rows, records = [], []
    for name, record in ((n, r) for results in families for n, r in results["cases"].items()):
        kept, default = record["time"].get("kept", {}), record["time"].get("default", {})
        eager = fastest(kept, record["eager"])
        if name not in chosen or eager is None or OURS not in kept:
            continue
        records.append(record)
        peak, ours = record["memory"].get(eager), record["memory"].get(OURS)
        rows.append([
            title(record), eager,
            f"{duration(summary(seconds(kept, eager)).median)} → {duration(summary(seconds(kept, OURS)).median)}",
            f"**{times_faster(kept, eager)}**",
            times_faster(default, eager),
            times_faster(kept, "lean"),
            f"{mebibytes(peak)} → {mebibytes(ours)}" if record["memory"] else "-",
        ])  # fmt: skip
    header = ["op", "fastest shipped form", "forward + backward", "faster", "default malloc", "vs lean eager",
              "peak memory"]  # fmt: skip
    note = "Masks, codes, searches and moving averages have no backward: one call. "
    return f"{table(header, rows, right=2)}\n\n{note}{machine_line(families[0]['machine'], records)}"


def floors(results: dict[str, Any]) -> str:
    """What the copies of the table move, in words: the byte counts behind "within 2x of its copy"."""
    lines = []
    for record in results["cases"].values():
        if parts := record.get("floor", {}).get("copy"):
            counted = " + ".join(f"{name} {count / 1e6:.1f}" for name, count in parts.items())
            lines.append(f"{title(record)}: {counted} = {sum(parts.values()) / 1e6:.1f} MB")
    return f"Bytes of the copies. {'; '.join(lines)}." if lines else ""


def full(results: dict[str, Any], picture: str | None = None) -> str:
    parts = [machine_line(results["machine"], results["cases"].values())]
    parts += [f"![speed and memory]({picture})"] if picture else []
    if any(record["goals"] for record in results["cases"].values()):
        parts += ["#### Goals", goals_table(results)]
    regimes = {regime for record in results["cases"].values() for regime in record["time"]}
    for regime in sorted(regimes, reverse=True):
        parts += [
            f"#### Memory {regime}" if regime == "kept" else f"#### malloc {regime}",
            times_table(results, regime),
        ]
    if results.get("encoder"):
        parts.append(
            f"Share of a step: beside {results['encoder']['name']}, "
            f"{duration(results['encoder']['seconds_per_image'])} an image."
        )
    parts += [floors(results)] if floors(results) else []
    sources = {f"{n}: {s}" for record in results["cases"].values() for n, s in record["sources"].items() if n != OURS}
    parts.append("Contenders: " + "; ".join(sorted(sources)) + ".")
    return "\n\n".join(parts)


def replace_between(text: str, marker: str, content: str) -> str:
    """Put `content` between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"text: expected the markers {begin} and {end}, in this order; they are not there")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def insert(path: Path, marker: str, content: str) -> None:
    try:
        path.write_text(replace_between(path.read_text(), marker, content))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
