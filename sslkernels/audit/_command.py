# SPDX-License-Identifier: Apache-2.0
"""`python -m sslkernels check-dist mymodule:make_loss`; its exit status is 0 where all is exact, else 1."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from sslkernels.audit._audit import check_dist, load
from sslkernels.audit._inputs import INPUTS, Inputs
from sslkernels.distributed._launch import place


def keywords(text: str) -> dict[str, Any]:
    """'temperature=0.2, gather_distributed=True' as a dictionary; literals only."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"must be like 'a=1, b=True', got {text!r}") from error


def _inputs(text: str) -> str | Inputs:
    if ":" not in text:
        return text
    try:
        found = load(text)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(found, Inputs):
        raise argparse.ArgumentTypeError(f"{text} must be a sslkernels.audit.Inputs, got {type(found).__name__}")
    return found


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="module:name of a loss, or of what makes one")
    parser.add_argument("--args", type=keywords, default={}, help="for what makes the loss: 'gather_distributed=True'")
    parser.add_argument("--inputs", type=_inputs, default="auto", help=f"{', '.join(INPUTS)}, or module:name of Inputs")
    parser.add_argument("--processes", type=int, nargs="+", help="numbers of ranks (default: 2 4)")
    parser.add_argument("--rows", type=int, default=8, help="of a rank (default: 8)")
    parser.add_argument("--dim", type=int, default=16, help="of the features (default: 16)")
    parser.add_argument("--uneven", action="store_true", help="every other rank has 3 rows more")
    parser.add_argument("--steps", type=int, default=2, help="of a loss that has a state (default: 2)")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative, of what is exact (default: 1e-6)")
    parser.add_argument("--json", type=_file, help="write what was found to this file")


def main(options: argparse.Namespace) -> None:
    launch = place()
    rank = launch[0] if launch else 0
    if launch and options.processes and rank == 0:
        print("check-dist: --processes is ignored: torchrun has started them", file=sys.stderr)
    try:
        audit = check_dist(
            options.target,
            options.inputs,
            arguments=options.args,
            processes=options.processes or (2, 4),
            rows=options.rows,
            dim=options.dim,
            uneven=options.uneven,
            steps=options.steps,
            tolerance=options.tolerance,
        )
    except (ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise SystemExit(f"check-dist: {error}") from error
    if rank:
        return  # torchrun ends all at the first failure, which must not come before what rank 0 prints
    print(audit)
    if options.json:
        options.json.write_text(json.dumps([f._asdict() for f in audit.findings], indent=2) + "\n")
    raise SystemExit(0 if audit.exact else 1)
