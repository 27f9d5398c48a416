# SPDX-License-Identifier: Apache-2.0
"""`python -m sslkernels info [--json]`, `show mae` and `check-dist module:loss`."""

from __future__ import annotations

import argparse
import json

from sslkernels import info, show
from sslkernels.audit import _command as check_dist


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkernels")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, libraries, devices, and what serves each op")
    command.add_argument("--json", action="store_true", help="for machines")
    show.add_arguments(commands.add_parser("show", help="train a method for a minute and draw what it does"))
    check_dist.add_arguments(commands.add_parser("check-dist", help="is a loss over several processes that of one?"))
    arguments = parser.parse_args()
    if arguments.command == "check-dist":
        check_dist.main(arguments)
        return
    if arguments.command == "show":
        show.main(arguments)
        return
    facts = info.gather()
    print(json.dumps(facts, indent=2) if arguments.json else info.text(facts))


if __name__ == "__main__":
    main()
