# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [family ...]` measures (every family if none is named);
`python -m benchmarks report [file ...]` makes tables and plots again from results files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import machine, report
from benchmarks.cases import FAMILIES, README, find
from benchmarks.stats import OURS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("what", nargs="*", help=f"{', '.join(FAMILIES)} (default: all); or: report [results file ...]")
    p.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    p.add_argument("--list", action="store_true", help="name the cases and stop")
    p.add_argument("--quick", action="store_true", help="5 rounds, memory kept only; into a file that is not committed")
    p.add_argument("--rounds", type=int, help="interleaved rounds (default 15)")
    p.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    p.add_argument("--no-memory", action="store_true", help="skip peak memory")
    p.add_argument("--compile", action="store_true", help="add torch.compile of every other contender (slow)")
    p.add_argument("--peers", action="store_true", help="compare our restatements with the real packages, and stop")
    p.add_argument("--plot", action="store_true", help="draw the picture too")
    p.add_argument("--readme", action="store_true", help="report: write the tables into README.md and docs/")
    return p


def publish(paths: list[Path], plot: bool, documents: bool) -> None:
    families = [json.loads(path.read_text()) for path in paths]
    for path, results in zip(paths, families, strict=True):
        picture = path.with_suffix(".png")
        if plot or documents:
            from benchmarks.plot import draw

            if not draw(results, picture):
                print(f"no plot: {path.name} has no case with {OURS} in it", file=sys.stderr)
        link = f"../benchmarks/results/{picture.name}" if picture.exists() else None
        path.with_suffix(".md").write_text(report.full(results, picture.name if link else None) + "\n")
        print(f"{report.goals_table(results)}\n\nwritten: {path.name} and what is made from it, in benchmarks/results/")
        if documents:
            marker = f"figures-{results['family']}"
            report.insert(machine.ROOT / "docs" / "benchmarks.md", marker, report.full(results, link))
    if documents:
        report.insert(machine.ROOT / "README.md", "wins", report.wins(families, README))


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)  # a file may follow an option
    from benchmarks import runner

    suffix = "-quick" if options.quick else ""
    if options.what[:1] == ["report"]:
        paths = [Path(file) for file in options.what[1:]]
        publish(
            paths or [path for family in FAMILIES if (path := runner.results_path(family, suffix)).exists()],
            options.plot,
            options.readme,
        )
        return 0
    if unknown := [family for family in options.what if family not in FAMILIES]:
        parser().error(f"family must be one of {', '.join(FAMILIES)}, or report; got {unknown[0]!r}")
    named = [find(name) for name in options.case or ()]
    chosen = {
        family: [case for case in cases if not named or case in named]
        for family, cases in FAMILIES.items()
        if not options.what or family in options.what
    }
    every = [case for cases in chosen.values() for case in cases]
    if options.list:
        print("\n".join(case.name for case in every))
        return 0
    if options.peers:
        from benchmarks.peers import compare

        return 0 if compare(every) else 1
    settings = runner.Options(
        rounds=options.rounds or (5 if options.quick else 15),
        threads=options.threads,
        regimes=("kept",) if options.quick else tuple(runner.REGIMES),
        memory=not options.no_memory,
        compile=options.compile,
    )
    wrong = []
    for family, cases in chosen.items():
        if not cases:
            continue
        path = runner.results_path(family, suffix)
        runner.run(family, cases, settings, arguments, path, say=lambda line: print(line, flush=True))
        publish([path], options.plot, documents=False)
        records = json.loads(path.read_text())["cases"]
        wrong += [case.name for case in cases if not records[case.name]["check"][OURS]["ok"]]
    if wrong:
        print(f"{OURS} is wrong or missing in: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
