# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the neighbours in the interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.reference import neighbors as reference
from sslkernels.triton import neighbors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("l2", "dot", "cosine")
# queries, keys, features: tiles of 16 queries and 32 keys and their neighbours, primes
SHAPES = [(1, 1, 1), (16, 32, 16), (17, 33, 40), (5, 131, 7)]


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


@pytest.mark.parametrize("k", [2, 32, 33, 70])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_many_neighbors(compare: Callable, metric: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70 keys, in registers and from panels of 16 queries and k keys."""
    monkeypatch.setattr(neighbors, "PANEL_BYTES", 1)
    compare("topk_similarity", spread(18, 7), spread(70, 7), k, metric, False)


def test_equal_keys_go_to_the_smaller_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across tiles, parts of the keys and panels; integers, so that equal scores have equal bits."""
    monkeypatch.setattr(neighbors, "PANEL_BYTES", 1)
    base = torch.randint(-2, 3, (13, 4)).float()
    keys = base.repeat(11, 1)
    for metric, exact in (("dot", base @ keys.T), ("l2", -(base[:, None] - keys).square().sum(-1))):
        order = exact.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(neighbors.nearest(base, keys, metric, False)[1], order[:, 0])
        for k in (9, 40):
            assert torch.equal(neighbors.topk_similarity(base, keys, k, metric, False)[1], order[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_offset_of_all_rows_costs_no_digit(dtype: torch.dtype) -> None:
    """Mean 1e3, deviation 10: counted from the origin, products in float32 are off by more than distances differ."""
    queries, keys = ((1e3 + 10 * torch.randn(n, 40)).to(dtype) for n in (20, 90))
    value, index = neighbors.nearest(queries, keys, "l2", False)
    exact = (queries.double()[:, None] - keys.double()).square().sum(-1)
    assert torch.equal(index, exact.argmin(1))
    torch.testing.assert_close(value.double(), exact.min(1).values, rtol=1e-6, atol=0)


def test_the_centre_is_the_reference_s() -> None:
    for keys in (spread(100, 5) + 7, spread(31, 5), spread(3, 40) - 9, spread(70, 3) * 100):
        keys[0], keys[1, 1], keys[2, 0] = 1e30, torch.nan, torch.inf
        search = neighbors._Search(keys, None, "l2", False)
        expected = reference.centre(keys)
        assert search.centre is not None and search.shifted is not None
        torch.testing.assert_close(search.centre, expected)
        assert bool(search.shifted) or not expected.any()
    keys = torch.full((5, 3), torch.nan)
    assert not neighbors._Search(keys, None, "l2", False).centre.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("metric", METRICS)
def test_nan_wins(compare: Callable, metric: str) -> None:
    """The first of several, and first among the k best."""
    queries, keys = spread(9, 5), spread(90, 5)
    keys[70, 1], keys[40, 3] = torch.nan, torch.tensor(torch.nan).neg()  # of either sign
    queries[2, 0] = torch.nan
    compare("nearest", queries, keys, metric, False)
    compare("topk_similarity", queries, keys, 4, metric, False)


def test_infinite_distance_loses(compare: Callable) -> None:
    queries, keys = spread(9, 5), spread(40, 5)
    keys[3, 2], keys[20] = torch.inf, 1e30  # whose square is infinite
    compare("nearest", queries, keys, "l2", False)
    compare("topk_similarity", queries, keys, 38, "l2", False)
    value, index = neighbors.topk_similarity(queries, keys, 40, "l2", False)
    assert value[:, 38:].isinf().all() and (index[:, 38:].sort(1).values == torch.tensor([3, 20])).all()


def test_all_scores_minus_infinity(compare: Callable) -> None:
    """The smallest indices that are not the query's own."""
    keys = torch.tensor([[-torch.inf, 0.0]]).repeat(90, 1)
    queries = torch.ones(18, 2)
    compare("nearest", queries, keys, "dot", True)
    compare("topk_similarity", queries, keys, 3, "dot", True)
    compare("topk_similarity", queries, keys, 40, "dot", True)


@pytest.mark.parametrize("scale", [1e-25, 1e18, 1e30])
def test_cosine_of_any_length(scale: float) -> None:
    """Squares of these underflow or overflow; below 1e-12 a length counts as that."""
    queries, keys = spread(9, 5), spread(20, 5)
    value, index = neighbors.nearest(queries * scale, keys * scale, "cosine", False)
    if scale < 1e-12:
        assert value.abs().max() < 1e-10
        return
    expected, chosen = neighbors.nearest(queries, keys, "cosine", False)
    assert torch.equal(index, chosen)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_no_queries_and_no_features(compare: Callable, metric: str) -> None:
    compare("nearest", torch.zeros(0, 4), torch.zeros(3, 4), metric, False)
    compare("nearest", torch.zeros(0, 4), None, metric, False)
    for k in (2, 40):
        compare("topk_similarity", torch.zeros(0, 4), torch.zeros(50, 4), k, metric, False)
    compare("topk_similarity", torch.zeros(2, 0), torch.zeros(3, 0), 2, metric, False)
    zeros = spread(3, 4)
    zeros[1] = 0
    compare("topk_similarity", zeros, None, 3, metric, False)


def test_the_same_bits() -> None:
    queries, keys = spread(9, 9, torch.bfloat16), spread(100, 9, torch.bfloat16)
    first, again = (neighbors.topk_similarity(queries, keys, 7, "l2", False) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))
