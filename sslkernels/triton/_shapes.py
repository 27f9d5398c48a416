# SPDX-License-Identifier: Apache-2.0
"""The one table of launch shapes: architecture -> kind of kernel -> bytes of an element -> tile, warps and stages.

Shared memory: sm_80 keeps to 99 KiB, so that 8.6, 8.9 and 12.0 take its row; sm_90 and sm_100 to 227 KiB, gfx942 to 64.
The interpreter's tiles are the smallest there are: small inputs cross their borders. `python -m benchmarks.occupancy`
shows what each needs; `make gpu` times them.
"""

from __future__ import annotations

from typing import Any

_DISTRACTORS = {"BLOCK_C": 32, "BLOCK_L": 128, "num_warps": 4}
_ROW = {"BLOCK": 1024, "num_warps": 4}  # a program a row, in pieces
_COMPLETE = {"BLOCK": 32, "BLOCK_D": 64, "num_warps": 4}
_LARGEST = {"BLOCK": 4096, "num_warps": 8}  # one program
_SAMPLED = {"ELEMENTS": 4096, "num_warps": 4}  # of the tile of gathered keys
_MERGE = {"BLOCK": 64, "SLOTS": 32, "BLOCK_D": 32, "num_warps": 4}


def _tile(n: int, m: int, d: int, warps: int, stages: int) -> dict[str, int]:
    """Of scores: n rows, m columns, d features at a time; GROUP rows of tiles share their operands in L2."""
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "GROUP": 16, "num_warps": warps, "num_stages": stages}


_TWO = {"maxnreg": 128}  # registers a thread, so that two blocks of 8 warps share a multiprocessor

SHAPES: dict[str, dict[str, Any]] = {
    "sm_80": {
        "distractors": _DISTRACTORS,
        "row": _ROW,
        "scores": {2: _tile(128, 128, 32, 8, 3), 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 64, 64, 4, 2)},
        "attention_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "complete": _COMPLETE,
        "gradient_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "largest": _LARGEST,
        "merge": _MERGE,
        "sampled": _SAMPLED,
        "weights": {2: _tile(128, 128, 32, 8, 4), 4: _tile(64, 64, 32, 4, 3)},
    },
    "sm_90": {
        "distractors": _DISTRACTORS,
        "row": _ROW,
        "scores": {2: _tile(128, 128, 64, 8, 3) | _TWO, 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2) | _TWO, 4: _tile(64, 64, 64, 4, 2)},
        "attention_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "complete": _COMPLETE,
        "gradient_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "largest": _LARGEST,
        "merge": _MERGE,
        "sampled": _SAMPLED,
        "weights": {2: _tile(128, 128, 64, 8, 3) | _TWO, 4: _tile(64, 64, 32, 4, 3)},
    },
    "sm_100": {
        "distractors": _DISTRACTORS,
        "row": _ROW,
        "scores": {2: _tile(128, 128, 64, 8, 3) | _TWO, 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2) | _TWO, 4: _tile(64, 64, 64, 4, 2)},
        "attention_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "complete": _COMPLETE,
        "gradient_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "largest": _LARGEST,
        "merge": _MERGE,
        "sampled": _SAMPLED,
        "weights": {2: _tile(128, 128, 64, 8, 3), 4: _tile(64, 64, 32, 4, 3)},
    },
    "gfx942": {
        "distractors": _DISTRACTORS,
        "row": _ROW,
        "scores": {2: _tile(128, 128, 32, 8, 2), 4: _tile(64, 64, 32, 4, 2)},
        "scores_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 64, 64, 4, 2)},
        "attention_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "complete": _COMPLETE,
        "gradient_whole": {2: _tile(128, 64, 128, 8, 2), 4: _tile(64, 32, 64, 4, 2)},
        "largest": _LARGEST,
        "merge": _MERGE,
        "sampled": _SAMPLED,
        "weights": {2: _tile(128, 128, 64, 8, 2), 4: _tile(64, 64, 32, 4, 2)},
    },
    "interpreter": {
        "distractors": {"BLOCK_C": 8, "BLOCK_L": 8},
        "row": {"BLOCK": 16},
        "scores": _tile(16, 16, 16, 4, 1),
        "scores_whole": _tile(16, 16, 32, 4, 1),
        "attention_whole": _tile(16, 16, 32, 4, 1),
        "complete": {"BLOCK": 16, "BLOCK_D": 16},
        "gradient_whole": _tile(16, 16, 32, 4, 1),
        "largest": {"BLOCK": 16},
        "merge": {"BLOCK": 16, "SLOTS": 4, "BLOCK_D": 16},
        "sampled": {"ELEMENTS": 128},
        "weights": _tile(16, 16, 16, 4, 1),
    },
}
