# SPDX-License-Identifier: Apache-2.0
"""The declared cases, by family."""

from benchmarks.case import Case
from benchmarks.cases import contrastive

FAMILIES: dict[str, tuple[Case, ...]] = {"contrastive": contrastive.CASES}


def find(name: str) -> Case:
    for cases in FAMILIES.values():
        for case in cases:
            if case.name == name:
                return case
    raise ValueError(f"no case {name!r}; known: {', '.join(c.name for cases in FAMILIES.values() for c in cases)}")
