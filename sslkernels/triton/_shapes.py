# SPDX-License-Identifier: Apache-2.0
"""The one table of launch shapes: architecture -> kind of kernel -> bytes of an element -> tile, warps and stages.

Shared memory: sm_80 keeps to 99 KiB, so that 8.6, 8.9 and 12.0 take its row; sm_90 and sm_100 to 227 KiB, gfx942 to 64.
The interpreter's tiles are the smallest there are: small inputs cross their borders. `python -m benchmarks.occupancy`
shows what each needs; `make gpu` times them.
"""

from __future__ import annotations

from typing import Any

_ROW = {"BLOCK": 1024, "num_warps": 4}  # a program a row, in pieces

SHAPES: dict[str, dict[str, Any]] = {
    "sm_80": {
        "row": _ROW,
    },
    "sm_90": {
        "row": _ROW,
    },
    "sm_100": {
        "row": _ROW,
    },
    "gfx942": {
        "row": _ROW,
    },
    "interpreter": {
        "row": {"BLOCK": 16},
    },
}
