# SPDX-License-Identifier: Apache-2.0
"""Launches of the neighbours' kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sslkernels.triton import neighbors

TENSOR_CORES = {"nearest_kernel", "topk_kernel", "panel_kernel"}
SPILLS: dict[str, int] = {}


def _search(dtype: torch.dtype, metric: str, k: int, m: int, own: bool) -> None:
    if dtype == torch.float16 and (k > 1 or metric != "dot"):
        return  # compiled as bfloat16 is
    queries, keys = (torch.empty(size, 768, dtype=dtype, device="meta") for size in (16384, m))
    if k == 1:
        neighbors.nearest(queries, None if own else keys, metric, own)
    else:
        neighbors.topk_similarity(queries, keys, k, metric, own)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "nearest, codebook": partial(_search, metric="l2", k=1, m=8192, own=False),
    "nearest, KoLeo": partial(_search, metric="dot", k=1, m=16384, own=True),
    "nearest, cosine": partial(_search, metric="cosine", k=1, m=65536, own=False),
    "20 neighbours": partial(_search, metric="cosine", k=20, m=65536, own=False),
    "20 neighbours by l2": partial(_search, metric="l2", k=20, m=65536, own=True),
    "200 neighbours": partial(_search, metric="cosine", k=200, m=65536, own=False),
}
