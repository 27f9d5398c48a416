# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the neighbours in the interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.triton import neighbors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("l2", "dot", "cosine")
# queries, keys, features: tiles of 16 queries and 32 keys and their neighbours, primes
SHAPES = [(1, 1, 1), (16, 32, 16), (17, 33, 17), (5, 131, 7), (37, 3, 40)]


def spread(rows: int, depth: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, depth).to(dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(compare: Callable, shape: tuple[int, int, int], metric: str) -> None:
    n, m, d = shape
    queries, keys = spread(n, d), spread(m, d)
    compare("nearest", queries, keys, metric, False)
    compare("topk_similarity", queries, keys, min(m, 3), metric, False)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(compare: Callable, dtype: torch.dtype, metric: str) -> None:
    queries, keys = spread(19, 18, dtype), spread(70, 18, dtype)
    compare("nearest", queries, keys, metric, True)
    compare("topk_similarity", queries, keys, 5, metric, False)


@pytest.mark.parametrize("metric", METRICS)
def test_mixed_dtypes_and_strides(compare: Callable, metric: str) -> None:
    queries, keys = spread(17, 36, torch.float16)[:, ::2], spread(18, 40).T
    compare("nearest", queries, keys, metric, False)
    compare("topk_similarity", queries.bfloat16(), keys, 2, metric, True)


@pytest.mark.parametrize("metric", METRICS)
def test_among_themselves(compare: Callable, metric: str) -> None:
    x = spread(40, 9)
    compare("nearest", x, None, metric, True)
    compare("nearest", x, None, metric, False)
    compare("topk_similarity", x, None, 6, metric, True)


@pytest.mark.parametrize("k", [1, 2, 32, 33, 70])
@pytest.mark.parametrize("metric", METRICS)
def test_many_neighbors(compare: Callable, metric: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70 keys, in registers and from panels of 16 queries and k keys."""
    monkeypatch.setattr(neighbors, "PANEL_BYTES", 1)
    compare("topk_similarity", spread(18, 7), spread(70, 7), k, metric, False)
