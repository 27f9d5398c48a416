# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.scaling` measures losses that span two gloo processes and writes docs/scaling.md's tables;
`--predict` measures nothing: what the model says of clusters of GPUs."""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks import machine
from benchmarks.report import insert
from benchmarks.runner import RESULTS
from benchmarks.scaling import measure, predict, report
from benchmarks.scaling.cases import LOSSES

WHAT = ("links", "bytes", "memory", "time")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    p.add_argument("what", nargs="*", help=f"{', '.join(WHAT)} (default: all), or report: tables again from the file")
    p.add_argument("--loss", action="append", choices=LOSSES, help="only this loss; may be repeated")
    p.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    p.add_argument("--predict", action="store_true", help="print the table of predictions and draw them, and stop")
    return p


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    docs = machine.ROOT / "docs" / "scaling.md"
    if unknown := [what for what in options.what if what not in (*WHAT, "report")]:
        parser().error(f"what must be one of {', '.join(WHAT)}, or report; got {unknown[0]!r}")
    tables = {"constants": predict.constants_table(), "predicted": report.predicted_table()}
    report.draw_predicted(RESULTS / "scaling-predicted.png")
    if not options.predict:
        if options.what != ["report"]:
            measure.run(options.rounds, options.what or list(WHAT), options.loss or list(LOSSES))
        results = json.loads(measure.path().read_text())
        tables |= report.tables(results)
        report.draw_memory(results, measure.path().with_suffix(".png"))
    for marker, made in tables.items():
        print(f"{made}\n")
        insert(docs, f"scaling-{marker}", made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
