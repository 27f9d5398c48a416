# SPDX-License-Identifier: Apache-2.0
"""`python -m sslkernels info [--json]`."""

from __future__ import annotations

import argparse
import json

from sslkernels import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkernels")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, libraries, devices, and what serves each op")
    command.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    facts = info.gather()
    print(json.dumps(facts, indent=2) if arguments.json else info.text(facts))


if __name__ == "__main__":
    main()
