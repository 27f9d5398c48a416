# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the report: quartiles, ratios of interleaved rounds, and whether a goal is met.

Everything is computed from the samples in the results file, so that a table can be made again from it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

OURS = "sslkernels"


@dataclass(frozen=True)
class Summary:
    low: float  # first quartile
    median: float
    high: float  # third quartile


def summary(values: list[float]) -> Summary:
    """Quartiles with linear interpolation between order statistics (NumPy's default rule)."""
    if not values:
        raise ValueError("values: expected at least one sample, got none")
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    return Summary(*statistics.quantiles(values, n=4, method="inclusive"))


def seconds(times: dict[str, dict[str, list[float]]], name: str, part: str = "both") -> list[float]:
    """One number per round: a contender's forward, backward, or the two together."""
    sample = times[name]
    if part == "both":
        return [f + b for f, b in zip(sample["forward"], sample["backward"], strict=True)]
    return sample[part]


def speedup(times: dict[str, dict[str, list[float]]], against: str, part: str = "both") -> Summary:
    """Their time over ours, round by round: both were measured within the same second."""
    pairs = zip(seconds(times, against, part), seconds(times, OURS, part), strict=True)
    return summary([theirs / ours for theirs, ours in pairs])


def fastest(times: dict[str, dict[str, list[float]]], names: list[str]) -> str | None:
    present = [name for name in names if name in times]
    return min(present, key=lambda name: summary(seconds(times, name)).median, default=None)


def baseline(record: dict[str, Any], times: dict[str, Any], against: str) -> str | None:
    """The contender that a goal compares with, or None if it was not measured."""
    if against == "eager":
        return fastest(times, record["eager"])
    return against if against in times else None


@dataclass(frozen=True)
class Verdict:
    goal: str
    got: str
    met: bool | None  # None: not measured


def judge(record: dict[str, Any], goal: dict[str, Any], regime: str) -> Verdict:
    """A time goal is met if the worse quartile of the ratios reaches it; a memory goal by the one figure."""
    limit = f"≥ {goal['at_least']:g}x" if goal["at_least"] is not None else f"≤ {goal['at_most']:g}x"
    if goal["what"] == "memory":
        limit = f"≤ {100 * goal['at_most']:g}% of memory of"
    times = record["time"].get(regime, {})
    other = baseline(record, times, goal["against"])
    text = f"{limit} {goal['against'] if other is None or goal['against'] == other else f'eager ({other})'}"
    if goal["what"] == "memory":
        peaks = record["memory"]
        if other is None or OURS not in peaks or not peaks.get(other):
            return Verdict(text, "not measured", None)
        share = peaks[OURS] / peaks[other]
        return Verdict(text, f"{100 * share:.1f}%", share <= goal["at_most"])
    if other is None or OURS not in times:
        return Verdict(text, "not measured", None)
    ratio = speedup(times, other)
    if goal["at_least"] is not None:
        return Verdict(text, f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})", ratio.low >= goal["at_least"])
    share = Summary(1 / ratio.high, 1 / ratio.median, 1 / ratio.low)
    return Verdict(text, f"{share.median:.2f}x ({share.low:.2f}-{share.high:.2f})", share.high <= goal["at_most"])
