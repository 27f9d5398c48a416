# SPDX-License-Identifier: Apache-2.0
"""The audit of `python -m sslkernels check-dist` over losses of this library and of others, where they import.

usage: PYTHONPATH=.:tests/distributed python -m benchmarks.check_dist [--json FILE]

Prints the table of docs/check_dist.md. The losses of tests/distributed/check_dist_cases.py restate what cannot be
installed here.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sslkernels.audit import Finding, check_dist

PROCESSES = (2, 4)


class Entry(NamedTuple):
    library: str
    target: str
    arguments: dict[str, Any]
    shown: str = ""


def _entries() -> list[Entry]:
    ours = [Entry("sslkernels", f"sslkernels.losses:{name}", {"gather_distributed": True}) for name in
            ("NTXentLoss", "DCLLoss", "BarlowTwinsLoss", "VICRegLoss", "TiCoLoss")]  # fmt: skip
    ours += [Entry("sslkernels", f"sslkernels.losses:{name}", {"process_group": "world"}) for name in
             ("ClipLoss", "SigLipLoss", "SupConLoss", "FroSSLLoss", "KoLeoLoss", "SwaVLoss")]  # fmt: skip
    ours.append(Entry("sslkernels", "sslkernels.losses:DINOLoss", {"process_group": "world", "output_dim": 16}))
    lightly = [Entry("lightly", f"lightly.loss:{name}", {"gather_distributed": True}) for name in
               ("NTXentLoss", "DCLLoss", "BarlowTwinsLoss", "VICRegLoss", "TiCoLoss")]  # fmt: skip
    lightly.append(Entry("lightly", "lightly.loss:SwaVLoss", {"sinkhorn_gather_distributed": True}))
    lightly.append(Entry("lightly", "lightly.loss:DINOLoss", {"output_dim": 16}))
    lightly += [Entry("lightly", f"lightly.loss:{name}", {}) for name in ("FroSSLLoss", "KoLeoLoss")]
    flags = [{"local_loss": a, "gather_with_grad": b} for a in (False, True) for b in (False, True)]
    clip = [Entry("open_clip_torch", "open_clip.loss:ClipLoss", x) for x in flags]
    clip.append(Entry("open_clip_torch", "open_clip.loss:SigLipLoss", {}))
    barlow = [
        ("Barlow Twins, original code, SyncBatchNorm", {"statistics": "all", "gradient": False}),
        ("solo-learn's BarlowTwins", {"statistics": "own", "gradient": False}),
    ]
    return ours + lightly + clip + [Entry("restated", "check_dist_cases:Barlow", x, name) for name, x in barlow]


def _name(entry: Entry) -> str:
    if entry.shown:
        return f"{entry.shown} (restated)"
    version = f" {metadata.version(entry.library)}" if entry.library != "sslkernels" else ""
    options = ", ".join(f"{name}={value!r}" for name, value in entry.arguments.items())
    return f"{entry.library.removesuffix('_torch')}{version} `{entry.target.split(':')[1]}({options})`"


def _row(name: str, findings: tuple[Finding, ...]) -> str:
    numbers = []
    for show in (lambda f: f.loss / f.true_loss, lambda f: f.cosine, lambda f: f.ratio):
        numbers.append(", ".join(f"{show(f):.4g}" for f in findings))
    return f"| {name} | {' | '.join(numbers)} | {findings[0].verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_dist")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args()
    print("| loss | loss / true, 2 and 4 ranks | cosine | norm ratio | verdict, 2 ranks |\n|---|---|---|---|---|")
    found = []
    for entry in _entries():
        try:
            audit = check_dist(entry.target, arguments=entry.arguments, processes=PROCESSES)
        except ImportError as error:
            print(f"{entry.target} is left out: {error}")
            continue
        print(_row(_name(entry), audit.findings), flush=True)
        found.append({"loss": _name(entry), "findings": [finding._asdict() for finding in audit.findings]})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
