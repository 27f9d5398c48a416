# SPDX-License-Identifier: Apache-2.0
"""nearest and topk_similarity against every pair written out in float64: shapes, dtypes, memory layouts, extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbors_cases import METRICS, assert_best, exact_scores
from torch import Tensor

from sslkernels import ops

# one, primes, a group of 16 and its neighbours, a tile of 256 and its neighbours, several tiles
SIZES = (1, 2, 3, 7, 15, 16, 17, 67, 255, 256, 257, 600)
WIDTHS = (1, 2, 3, 15, 16, 17, 64, 131)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    n, m, d = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(WIDTHS))
    metric, own = draw(st.sampled_from(METRICS)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    queries = torch.randn(n, d).to(draw(st.sampled_from(DTYPES)))
    keys = None if own else torch.randn(m, d).to(draw(st.sampled_from(DTYPES)))
    count = n if own else m
    exclude_self = n <= count and count > 1 and draw(st.booleans())
    k = draw(st.integers(1, count - exclude_self))
    options = {"metric": metric, "exclude_self": exclude_self}
    assert_best(ops.nearest(queries, keys, **options), queries, keys, **options)
    assert_best(ops.topk_similarity(queries, keys, k, **options), queries, keys, **options)


def test_by_hand() -> None:
    keys = torch.tensor([[0.0, 1.0], [4.0, 0.0], [-1.0, -1.0]])
    queries = torch.tensor([[1.0, 1.0], [0.0, -3.0]])
    value, index = ops.nearest(queries, keys)
    assert value.tolist() == [1.0, 5.0] and index.tolist() == [0, 2]
    value, index = ops.nearest(queries, keys, metric="dot")
    assert value.tolist() == [4.0, 3.0] and index.tolist() == [1, 2]
    value, index = ops.topk_similarity(queries, keys, 2, metric="cosine")
    torch.testing.assert_close(value, torch.tensor([[0.5**0.5, 0.5**0.5], [0.5**0.5, 0.0]]))
    assert index.tolist() == [[0, 1], [2, 1]]
    value, index = ops.topk_similarity(keys, None, 2, metric="l2", exclude_self=True)
    assert value.tolist() == [[5.0, 17.0], [17.0, 26.0], [5.0, 26.0]] and index.tolist() == [[2, 1], [0, 2], [0, 1]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("copies", [2, 40])
def test_equal_keys_go_to_the_smaller_index(metric: str, copies: int) -> None:
    """Across tiles and threads, in the symmetric sweep too; integers, so that equal scores have equal bits."""
    base = torch.randint(-3, 4, (37, 8)).float()
    keys = base.repeat(copies, 1)
    exact = exact_scores(base, keys, metric)
    _, index = ops.nearest(base, keys, metric=metric)
    assert torch.equal(index, (exact == exact.max(1, keepdim=True).values).int().argmax(1))
    order = exact.sort(dim=1, descending=True, stable=True).indices
    if metric != "cosine":  # whose lengths are rounded
        assert torch.equal(ops.topk_similarity(base, keys, 50, metric=metric)[1], order[:, :50])
        own = exact_scores(keys, keys, metric).fill_diagonal_(-torch.inf)
        _, index = ops.nearest(keys, metric=metric, exclude_self=True)
        assert torch.equal(index, (own == own.max(1, keepdim=True).values).int().argmax(1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("own", [False, True])
def test_equal_real_keys_go_to_the_smaller_index(metric: str, own: bool) -> None:
    """Rows as they come: their products have the same bits wherever in a tile they are."""
    base = torch.randn(300, 33)
    if metric == "dot":  # else a longer row would win
        base /= base.norm(dim=1, keepdim=True)
    keys = torch.cat([base, base.flip(0), base])
    _, index = ops.nearest(keys, None if own else keys.clone(), metric=metric, exclude_self=True)
    assert torch.equal(index[:300], 599 - torch.arange(300))
    assert torch.equal(index[300:600], torch.arange(300).flip(0))
    assert torch.equal(index[600:], torch.arange(300))


@pytest.mark.parametrize("k", [1, 20, 999, 1000, 3001])
def test_many_neighbors(k: int) -> None:
    queries, keys = torch.randn(5, 12), torch.randn(3001, 12)
    for metric in METRICS:
        assert_best(ops.topk_similarity(queries, keys, k, metric=metric), queries, keys, metric=metric)
    ascending = (torch.arange(3001.0)[:, None] / 3001).expand(-1, 2)  # each key is better than all before it
    _, index = ops.topk_similarity(torch.ones(2, 2), ascending, k)
    assert torch.equal(index, torch.arange(3000, 3000 - k, -1).expand(2, -1))


@pytest.mark.parametrize("own", [False, True])
def test_an_offset_of_all_rows_costs_no_digit(own: bool) -> None:
    """Mean 1e3, deviation 1: |q|^2 + |k|^2 - 2 <q, k> has an error of 0.1 here, the differences' own is 1e-4."""
    queries, keys = torch.randn(300, 64) + 1e3, torch.randn(700, 64) + 1e3
    other = None if own else keys
    value, index = ops.nearest(queries, other, exclude_self=own)
    exact = -exact_scores(queries, queries if own else keys, "l2")
    if own:
        exact.fill_diagonal_(torch.inf)
    chosen = exact.gather(1, index[:, None])[:, 0]
    assert (chosen <= exact.min(1).values * (1 + 1e-5)).all()
    torch.testing.assert_close(value.double(), chosen, rtol=1e-6, atol=0)


def test_one_key_far_away_moves_no_centre() -> None:
    """The mean of these keys is 2e4 from all but one of them."""
    queries, keys = torch.randn(100, 16), torch.randn(500, 16)
    keys[0] = 1e7
    for bad in (1e7, 1e30, torch.inf, torch.nan):
        keys[250] = bad
        expected = exact_scores(queries, keys.nan_to_num(1e30, 1e30), "l2").argmax(1)
        if bad == bad:
            assert torch.equal(ops.nearest(queries, keys)[1], expected)


def test_no_worse_than_the_norms_of_cdist() -> None:
    """Two clusters with the origin between them: no centre is good for both."""
    queries = torch.randn(200, 32) + 100 * torch.randint(0, 2, (200, 1)) * 2 - 100
    keys = torch.randn(400, 32) + 100 * torch.randint(0, 2, (400, 1)) * 2 - 100
    exact = -exact_scores(queries, keys, "l2")

    def regret(index: Tensor) -> Tensor:
        return (exact.gather(1, index[:, None])[:, 0] - exact.min(1).values).max()

    cdist = torch.cdist(queries, keys, compute_mode="use_mm_for_euclid_dist").argmin(1)
    # lengths from one cluster are at most twice those from the origin, squares four times
    bound = 8 * torch.finfo(torch.float32).eps * 4 * 32 * 1e4
    assert regret(ops.nearest(queries, keys)[1]) <= max(2 * regret(cdist), bound)


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.randn(x.shape[0], 2 * x.shape[1]).to(x.dtype)
    wide[:, ::2] = x
    padded = torch.randn(x.shape[0] + 2, x.shape[1] + 3).to(x.dtype)
    padded[1:-1, :-3] = x
    return {
        "every other column": wide[:, ::2],
        "slice": padded[1:-1, :-3],
        "transposed": x.T.contiguous().T,
        "flipped": torch.as_strided(x.repeat(2, 1), x.shape, (x.stride(0), 1), x.numel()),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1)))
def test_strides(layout: str, metric: str, dtype: torch.dtype) -> None:
    queries, keys = torch.randn(70, 21).to(dtype), torch.randn(300, 21).to(dtype)
    for own in (False, True):
        for moved_queries, moved_keys in ((layouts(queries)[layout], keys), (queries, layouts(keys)[layout])):
            moved = moved_queries, None if own else moved_keys
            dense = queries, None if own else keys
            for x, y in zip(
                ops.topk_similarity(*moved, 3, metric=metric), ops.topk_similarity(*dense, 3, metric=metric)
            ):
                torch.testing.assert_close(x, y)
            for x, y in zip(ops.nearest(*moved, metric=metric), ops.nearest(*dense, metric=metric)):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("metric", METRICS)
def test_one_feature_in_any_stride(metric: str) -> None:
    """A single column may have any stride and still lie as BLAS wants it."""
    wide = torch.randn(50, 6)
    for column in (wide[:1].T, wide[:, ::2][:, :1], wide[:, 3:4]):
        for x, y in zip(ops.nearest(column, metric=metric), ops.nearest(column.contiguous(), metric=metric)):
            assert torch.equal(x, y)


def test_one_row_for_all_queries() -> None:
    queries, keys = torch.randn(1, 5).expand(40, 5), torch.randn(9, 5)
    assert ops.nearest(queries, keys)[1].unique().numel() == 1
    value, index = ops.nearest(queries, None, exclude_self=True)
    assert not value.any() and index.tolist() == [1] + [0] * 39


@pytest.mark.parametrize("metric", METRICS)
def test_no_queries_and_no_features(metric: str) -> None:
    value, index = ops.nearest(torch.zeros(0, 4), torch.zeros(3, 4), metric=metric)
    assert value.shape == index.shape == (0,) and index.dtype == torch.int64
    assert ops.topk_similarity(torch.zeros(0, 4), torch.zeros(3, 4), 2, metric=metric)[1].shape == (0, 2)
    assert ops.nearest(torch.zeros(0, 4), metric=metric)[1].shape == (0,)
    value, index = ops.topk_similarity(torch.zeros(2, 0), torch.zeros(3, 0), 2, metric=metric)
    assert not value.any() and index.tolist() == [[0, 1], [0, 1]]


def test_rows_of_zeros_have_cosine_zero() -> None:
    queries, keys = torch.randn(3, 4), -torch.rand(5, 4) - 1
    queries[1], keys[3] = 0, 0
    value, index = ops.topk_similarity(queries.abs(), keys, 5, metric="cosine")
    assert value[1].tolist() == [0.0] * 5 and index[1].tolist() == [0, 1, 2, 3, 4]
    assert value[0, 0] == 0 and index[0, 0] == 3 and value[0, 1] < 0


@pytest.mark.parametrize("scale", [1e-25, 1e18, 1e30])
def test_cosine_of_any_length(scale: float) -> None:
    """Squares of these underflow or overflow; below 1e-12 a length counts as that."""
    queries, keys = torch.randn(20, 8), torch.randn(30, 8)
    value, index = ops.nearest(queries * scale, keys * scale, metric="cosine")
    if scale < 1e-12:
        assert value.abs().max() < 1e-10
        return
    expected, chosen = ops.nearest(queries, keys, metric="cosine")
    assert torch.equal(index, chosen)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_wins(metric: str, own: bool) -> None:
    """As in torch.max and torch.topk: the first of several, and first among the k best."""
    keys = torch.randn(400, 9)
    keys[[70, 310], [3, 1]] = torch.nan
    queries = keys if own else torch.randn(80, 9)
    other = None if own else keys
    value, index = ops.nearest(queries, other, metric=metric, exclude_self=own)
    clean = ~queries.isnan().any(1)
    assert value.isnan().all() and (index[clean] == 70).all()
    if own:
        assert (index[~clean] == 0).all()  # all their scores are NaN
    value, index = ops.topk_similarity(queries, other, 4, metric=metric, exclude_self=own)
    assert value[clean, :2].isnan().all() and not value[clean, 2:].isnan().any()
    assert (index[clean, :2] == torch.tensor([70, 310])).all()


@pytest.mark.parametrize("metric", METRICS)
def test_query_of_nan(metric: str) -> None:
    queries, keys = torch.randn(5, 3), torch.randn(50, 3)
    queries[2, 1] = torch.nan
    value, index = ops.topk_similarity(queries, keys, 40, metric=metric)
    assert value[2].isnan().all() and index[2].tolist() == list(range(40))
    assert value[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("own", [False, True])
def test_infinite_distance_loses(own: bool) -> None:
    keys = torch.randn(300, 6)
    keys[7, 2], keys[200, 5] = torch.inf, 1e30  # whose square is infinite
    queries = keys if own else torch.randn(20, 6)
    value, index = ops.nearest(queries, None if own else keys, exclude_self=own)
    finite = queries.square().sum(1).isfinite()
    assert value[finite].isfinite().all() and not torch.isin(index, torch.tensor([7, 200])).any()
    assert value[~finite].isinf().all() and finite.sum() == (298 if own else 20)
    value, index = ops.topk_similarity(queries, None if own else keys, 299, metric="l2", exclude_self=own)
    assert (value[finite][:, -1] == torch.inf).all()
    far = index[finite][:, -2:]
    assert (torch.isin(far, torch.tensor([7, 200])).sum(1) == (2 if own else 1 + far.eq(200).any(1).int())).all()


def test_all_scores_minus_infinity() -> None:
    """The smallest indices that are not the query's own, in the symmetric sweep too."""
    keys = torch.tensor([[-torch.inf, 0.0]]).expand(300, 2)
    queries = torch.ones(20, 2)
    _, index = ops.nearest(queries, keys, metric="dot", exclude_self=True)
    assert index.tolist() == [1] + [0] * 19
    _, index = ops.topk_similarity(queries, keys, 3, metric="dot", exclude_self=True)
    assert index[0].tolist() == [1, 2, 3] and index[1].tolist() == [0, 2, 3] and index[5].tolist() == [0, 1, 2]
    value, index = ops.nearest(torch.tensor([[1e30], [-1e30]]), metric="dot", exclude_self=True)
    assert value.tolist() == [-torch.inf, -torch.inf] and index.tolist() == [1, 0]
