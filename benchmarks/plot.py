# SPDX-License-Identifier: Apache-2.0
"""Bars of speed and of peak memory from a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import BLURRED
from benchmarks.stats import OURS, fastest, speedup

LEGEND = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 1, "fontsize": "small", "frameon": False}


def label(record: dict[str, Any]) -> str:
    sizes = (f"{k}={v}" for k, v in record["shape"].items())
    return " ".join(filter(None, (record["op"], record.get("variant", ""), *sizes)))


def draw_memory(axis: Any, records: list[dict[str, Any]], regime: str) -> None:
    for offset, name, colour in ((-0.2, "eager", "#d62728"), (0.2, OURS, "#2ca02c")):
        peaks = [r["memory"].get(fastest(r["time"][regime], r["eager"]) if name == "eager" else name) for r in records]
        what = "fastest shipped form" if name == "eager" else name
        have = [(row + offset, peak) for row, peak in enumerate(peaks) if peak is not None]
        # Below the resolution a bar would promise more than was measured.
        axis.barh([y for y, _ in have], [max(peak, BLURRED) for _, peak in have], 0.38, color=colour, label=what)
    axis.set_xscale("log")
    axis.set_xlabel(f"extra peak memory of a step, MiB (resolution {BLURRED:g})")
    axis.set_xlim(left=0.8 * BLURRED)
    axis.legend(**LEGEND)


def draw(results: dict[str, Any], path: Path, regime: str = "kept") -> bool:
    """Write the picture to `path`; False if no case has our time to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [r for r in results["cases"].values() if OURS in r["time"].get(regime, {})]
    if not records:
        return False
    weighed = any(r["memory"] for r in records)
    size = (14 if weighed else 10, 1.6 + 0.42 * len(records))
    figure, axes = plt.subplots(1, 1 + weighed, figsize=size, sharey=True, squeeze=False)
    speed = axes[0, 0]
    rows = range(len(records))
    height = 0.38
    for offset, other, colour in ((-0.2, "eager", "#1f77b4"), (0.2, "lean", "#9ecae1")):
        names = [fastest(r["time"][regime], r["eager"]) if other == "eager" else other for r in records]
        ratios = [speedup(r["time"][regime], name) if name in r["time"][regime] else None
                  for r, name in zip(records, names, strict=True)]  # fmt: skip
        have = [(row, ratio) for row, ratio in zip(rows, ratios, strict=True) if ratio]
        if not have:
            continue
        middle = [ratio.median for _, ratio in have]
        spread = [[ratio.median - ratio.low for _, ratio in have], [ratio.high - ratio.median for _, ratio in have]]
        what = "than the fastest shipped form" if other == "eager" else "than our algebra in plain torch"
        speed.barh(
            [row + offset for row, _ in have], middle, height, xerr=spread, color=colour, ecolor="#444", label=what
        )
    if speed.get_xlim()[1] > 25:
        speed.set_xscale("log")
    speed.axvline(1, color="#444", linewidth=0.8)
    speed.set_yticks(list(rows), [label(r) for r in records])
    speed.margins(y=0.02)
    speed.invert_yaxis()
    speed.set_xlabel(f"times faster (memory {regime}; whiskers: quartiles)")
    speed.legend(**LEGEND)
    if weighed:
        draw_memory(axes[0, 1], records, regime)
    figure.suptitle(f"{results['family']}, {results['machine']['cpu']}, {results['machine']['cores']} cores, float32")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
