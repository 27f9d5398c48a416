# SPDX-License-Identifier: Apache-2.0
"""The correlation ops against the originals in float64: any shape, dtype and stride, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from correlation_cases import OPS, REFERENCES, SCALARS, check, evaluate, views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import ops

# one, primes, a vector of 16 and its neighbours, a tile of 128 and its neighbours; both sides of N = D / 2
ROWS = (2, 3, 7, 15, 16, 17, 31, 33, 64, 127, 128, 129, 150, 257)
COLS = (1, 2, 3, 5, 16, 17, 31, 33, 64, 67, 129, 257, 300, 513)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_shape_and_dtype(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(list(OPS)))
    n, d = draw(st.sampled_from(ROWS)), draw(st.sampled_from(COLS))
    torch.manual_seed(draw(st.integers(0, 99)))
    xs = [x.to(draw(st.sampled_from(DTYPES))) for x in views(n, d, OPS[name].views)]
    if OPS[name].wider:
        xs[1] = torch.randn(n, draw(st.sampled_from(COLS))).to(xs[1].dtype)
    check(name, xs)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("n", [63, 64, 65, 66])
def test_both_sides_of_the_rule(name: str, n: int) -> None:
    """N = D / 2 and its neighbours: the N x N form up to there, the D x D form beyond; exact in float64."""
    check(name, views(n, 129, OPS[name].views, dtype=torch.float64))
    check(name, views(n, 128, OPS[name].views, dtype=torch.float64))


SHAPES = [(name, shape) for shape in ((40, 1500), (600, 1300)) for name in SCALARS]
SHAPES += [(name, (1030, 2100)) for name in ("two_view_correlation", "a^T a off")]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_several_tiles_and_panels(name: str, shape: tuple[int, int], threads: int) -> None:
    """One tile, tiles of 128, tiles of 256 and two panels of columns; with one thread and with two."""
    xs = views(*shape, OPS[name].views)
    for got, want in zip(evaluate(OPS[name].ours, xs), evaluate(REFERENCES[name], [x.double() for x in xs])):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("shape", [(500, 600), (90, 170)], ids=str)
def test_panels_of_the_feature_space(name: str, shape: tuple[int, int], threads: int) -> None:
    """Panels of a symmetric C, and columns that two threads share."""
    xs = views(*shape, OPS[name].views)
    for got, want in zip(evaluate(OPS[name].ours, xs), evaluate(REFERENCES[name], [x.double() for x in xs])):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_rows_of_c_in_panels() -> None:
    """A C of more than 16 MiB is never stored whole."""
    xs = tuple(torch.randn(32, d) for d in (2500, 40))
    a, b = torch.randn(1300, 2500), torch.randn(1300, 2500)
    value, da, db = evaluate(lambda a, b: ops.product_frobenius(a, b, off_diagonal=True), (a, b))
    c = (a.T.double() @ b.double()).fill_diagonal_(0)
    torch.testing.assert_close(value.double(), c.square().sum(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(da.double(), 2 * b.double() @ c.T, rtol=1e-4, atol=1.0)
    torch.testing.assert_close(db.double(), 2 * a.double() @ c, rtol=1e-4, atol=1.0)
    check("a^T b", xs)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values otherwise in memory."""
    wide = torch.randn(x.shape[0], 2 * x.shape[1]).to(x.dtype)
    wide[:, ::2] = x
    padded = torch.randn(x.shape[0] + 2, x.shape[1] + 3).to(x.dtype)
    padded[1:-1, 1:-2] = x
    return {
        "every other column": wide[:, ::2],
        "slice": padded[1:-1, 1:-2],
        "transposed": x.T.contiguous().T,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(33, 100), (70, 37)], ids=str)
@pytest.mark.parametrize("layout", layouts(torch.zeros(3, 3)))
@pytest.mark.parametrize("name", OPS)
def test_strides(name: str, layout: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    xs = views(*shape, OPS[name].views, dtype=dtype)
    moved = [layouts(x)[layout] for x in xs]
    assert moved[0].stride() != xs[0].stride()
    for got, want in zip(evaluate(OPS[name].ours, moved), evaluate(OPS[name].ours, xs)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=str)
def test_expanded_view(shape: tuple[int, int]) -> None:
    """One row repeated without a copy: constant columns, of which nothing is correlated."""
    x, y = views(*shape, dtype=torch.float64)
    same = y[:1].expand(shape)
    assert same.stride(0) == 0
    check("two_view_covariance", (x, same))
    check("a^T b", (x, same))
    assert ops.two_view_correlation(x, same) == shape[1]  # c = 0


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(40, 100), (70, 31)], ids=str)
def test_rows_and_columns_may_be_permuted(name: str, shape: tuple[int, int]) -> None:
    xs = views(*shape, OPS[name].views, dtype=torch.float64)
    rows, cols = torch.randperm(shape[0]), torch.randperm(shape[1])
    value, *grads = evaluate(OPS[name].ours, xs)
    if name.startswith("standardize"):
        torch.testing.assert_close(ops.standardize(xs[0][rows][:, cols]), ops.standardize(xs[0])[rows][:, cols])
        return
    other, *others = evaluate(OPS[name].ours, [x[rows][:, cols] for x in xs])
    torch.testing.assert_close(other, value)
    for got, want in zip(others, grads):
        torch.testing.assert_close(got, want[rows][:, cols])


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=str)
def test_views_may_be_shifted_and_scaled(shape: tuple[int, int]) -> None:
    """What standardising takes away; VICReg's covariance knows no mean."""
    x, y = views(*shape, dtype=torch.float64)
    scale, shift = 1 + torch.rand(shape[1], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    loss = ops.two_view_correlation(x, y, eps=1e-12)
    torch.testing.assert_close(ops.two_view_correlation(x * scale + shift, y, eps=1e-12), loss)
    torch.testing.assert_close(ops.two_view_covariance(x + shift, y + shift), ops.two_view_covariance(x, y))


def test_values_by_hand() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert ops.two_view_correlation(x, x, eps=1e-12).item() == pytest.approx(0.0, abs=1e-10)  # c = identity
    assert ops.two_view_correlation(x, -x, eps=1e-12).item() == pytest.approx(8.0)  # c = -identity
    assert ops.two_view_correlation(x, x.flip(1), 0.1, eps=1e-12).item() == pytest.approx(2.2)  # c = 1 - identity
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    assert ops.product_frobenius(a, b).item() == 9 + 25 + 36 + 100
    assert ops.product_frobenius(a, b, off_diagonal=True).item() == 25 + 36
    assert ops.product_frobenius(a, off_diagonal=True).item() == 8
    y = torch.zeros(4, 2)
    std = (4 / 3 + 1e-4) ** 0.5
    hinge = 25 * max(0.0, 1 - std) + 25 * (1 - 1e-2)
    assert ops.two_view_covariance(x, y).item() == pytest.approx(25 * 1 + hinge)
    assert ops.two_view_covariance(x, x + x[:, :1], invariance=0.0, variance=0.0).item() == pytest.approx(64 / 9)
    assert ops.standardize(torch.tensor([[3.0], [5.0]])).flatten().tolist() == pytest.approx([-1, 1], rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_is_its_own_mean(dtype: torch.dtype) -> None:
    x = torch.full((1, 5), 3.7, dtype=dtype, requires_grad=True)
    z = ops.standardize(x)
    z.sum().backward()
    assert x.grad is not None and not z.any() and not x.grad.any() and z.dtype == dtype
    assert ops.two_view_correlation(x, x) == 5


def test_nothing_to_multiply() -> None:
    for a_shape, b_shape in (((0, 3), (0, 4)), ((3, 0), (3, 4)), ((0, 0), (0, 0))):
        a, b = torch.zeros(a_shape, requires_grad=True), torch.zeros(b_shape, requires_grad=True)
        value = ops.product_frobenius(a, b)
        value.backward()
        assert value == 0 and a.grad is not None and b.grad is not None
        assert not a.grad.any() and not b.grad.any() and a.grad.shape == a_shape
        assert ops.product_frobenius(a, off_diagonal=True) == 0
    assert ops.standardize(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("name", SCALARS)
def test_not_finite(name: str, shape: tuple[int, int], bad: float) -> None:
    xs = views(*shape, OPS[name].views)
    xs[0][3, 4] = bad
    value, *grads = evaluate(OPS[name].ours, xs)
    want, *wanted = evaluate(OPS[name].written_out, xs)
    assert value.isfinite() == want.isfinite() == False  # noqa: E712
    for got, expected in zip(grads, wanted):
        assert not got[~expected.isfinite()].isfinite().any()


def test_a_column_that_is_not_finite_stays_alone() -> None:
    x = torch.randn(9, 20)
    x[2, 3] = torch.nan
    z = ops.standardize(x)
    assert z[:, 3].isnan().all() and z.isnan().sum() == 9
