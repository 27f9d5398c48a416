# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [family]` measures; `python -m benchmarks report` makes tables and plots again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import machine, report
from benchmarks.cases import FAMILIES, find
from benchmarks.stats import OURS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("family", nargs="?", default="contrastive", choices=[*FAMILIES, "report"])
    p.add_argument("file", nargs="?", type=Path, help="report: the results file (default: this machine's)")
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


def publish(path: Path, plot: bool, documents: bool) -> None:
    results = json.loads(path.read_text())
    picture = path.with_suffix(".png")
    if plot or documents:
        from benchmarks.plot import draw

        if not draw(results, picture):
            print(f"no plot: {path.name} has no case with {OURS} in it", file=sys.stderr)
    link = f"../benchmarks/results/{picture.name}" if picture.exists() else None
    path.with_suffix(".md").write_text(report.full(results, picture.name if link else None) + "\n")
    print(f"{report.goals_table(results)}\n\nwritten: {path.name} and what is made from it, in benchmarks/results/")
    if documents:
        report.insert(machine.ROOT / "README.md", "wins", report.wins(results))
        report.insert(machine.ROOT / "docs" / "benchmarks.md", "figures", report.full(results, link))


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)  # a file may follow an option
    family = next(iter(FAMILIES)) if options.family == "report" else options.family
    cases = [find(name) for name in options.case] if options.case else list(FAMILIES[family])
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.peers:
        from benchmarks.peers import compare

        return 0 if compare(cases) else 1

    from benchmarks import runner

    path = options.file or runner.results_path(family, "-quick" if options.quick else "")
    if options.family == "report":
        publish(path, options.plot, options.readme)
        return 0
    settings = runner.Options(
        rounds=options.rounds or (5 if options.quick else 15),
        threads=options.threads,
        regimes=("kept",) if options.quick else tuple(runner.REGIMES),
        memory=not options.no_memory,
        compile=options.compile,
    )
    runner.run(family, cases, settings, arguments, path, say=lambda line: print(line, flush=True))
    publish(path, options.plot, documents=False)
    records = json.loads(path.read_text())["cases"]
    wrong = [case.name for case in cases if not records[case.name]["check"][OURS]["ok"]]
    if wrong:
        print(f"{OURS} is wrong or missing in: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
