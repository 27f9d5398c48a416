# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu/tiles.inl against NumPy in float64 (float64 itself: long double), for each instruction set.

Tiles are views of wider arrays, so a row stride that a function ignores shows; what lies between the rows must stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

# one element, vector widths (4 to 16) and the tile's width, each +- 1
SHAPES = [(1, 1), (3, 7), (2, 16), (5, 17), (7, 33), (2, 512), (3, 513)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
UNTOUCHED = 12345.0
NONE = -np.inf
# relative errors of exp as tiles.inl states them, and where it goes to zero: below exp(-70) and exp(-693)
EXP_ERROR = {"float32": 2e-7, "float64": 4e-16}
FLUSH = {"float32": -70.0, "float64": -693.1}
TOP = {"float32": 88.0, "float64": 709.0}


def exact(x: Array) -> Array:
    return x.astype(np.longdouble)


def eps(dtype: str) -> float:
    return float(np.finfo(dtype).eps)


def random(*shape: int, low: float = -20, high: float = 3, dtype: str, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).uniform(low, high, shape).astype(dtype)


def strided(x: Array) -> Array:
    """The same values in a view whose rows are five elements farther apart."""
    out = np.full((x.shape[0], x.shape[1] + 5), UNTOUCHED, x.dtype)
    out[:, : x.shape[1]] = x
    return out[:, : x.shape[1]]


def margin(view: Array) -> Array:
    return view.base[:, view.shape[1] :]


def new(*shape: int, dtype: str) -> Array:
    return np.full(shape, np.nan, dtype)


def assert_close(x: Array, truth: Array, bound: float, size: Array | float | None = None) -> None:
    """|x - truth| <= bound * size, where size is |truth| or what its terms add up to."""
    size = np.abs(truth) if size is None else size
    error = np.abs(exact(x) - truth)
    assert np.all(error <= bound * size), f"largest error {np.max(error / (bound * size + 1e-300))} times the bound"


def sum_bound(dtype: str, terms: int) -> float:
    """exp of each term, and additions in the working precision, a few at a time."""
    return EXP_ERROR[dtype] + eps(dtype) * (2 + terms / 4)


# exp


def test_exp_over_its_range(tile: Any, dtype: str) -> None:
    x = np.concatenate([np.linspace(FLUSH[dtype], TOP[dtype], 400_009), -np.logspace(-40, 1.8, 50_000)]).astype(dtype)
    out = np.empty_like(x)
    tile.exp(x, out)
    assert_close(out, np.exp(exact(x)), EXP_ERROR[dtype])


def test_exp_of_each_power_of_two_and_its_neighbours(tile: Any, dtype: str) -> None:
    """Where the integer part changes the polynomial's argument changes sides."""
    turns = ((np.arange(-100, 126) + 0.5) * np.log(2)).astype(dtype)
    x = np.concatenate([turns, np.nextafter(turns, turns.dtype.type(-1e9)), np.nextafter(turns, turns.dtype.type(1e9))])
    out = np.empty_like(x)
    tile.exp(x, out)
    assert_close(out, np.exp(exact(x)), EXP_ERROR[dtype])


def test_exp_is_zero_below_its_flush_limit(tile: Any, dtype: str) -> None:
    x = -np.logspace(np.log10(-FLUSH[dtype] + 0.1), np.log10(np.finfo(dtype).max) - 1, 10_001).astype(dtype)
    out = np.empty_like(x)
    tile.exp(x, out)
    assert not out.any()


def test_exp_of_special_numbers(tile: Any, dtype: str) -> None:
    x = np.array([np.nan, -np.inf, 0.0, -0.0, np.finfo(dtype).smallest_subnormal], dtype)
    out = np.empty_like(x)
    tile.exp(x, out)
    np.testing.assert_array_equal(out, np.array([np.nan, 0, 1, 1, 1], dtype))


# sums of exponentials


@shapes
def test_maxima(tile: Any, dtype: str, shape: tuple[int, int]) -> None:
    s = strided(random(*shape, dtype=dtype))
    s[0, :] = NONE
    s[-1, -1] = np.nan  # passed over: it shows in the sums
    row, col, row_only = new(shape[0], dtype=dtype), new(shape[1], dtype=dtype), new(shape[0], dtype=dtype)
    tile.maxima(s, row, col)
    tile.maxima(s, row_only, None)
    finite = np.where(np.isnan(s), NONE, s)
    np.testing.assert_array_equal(row, finite.max(1))
    np.testing.assert_array_equal(col, finite.max(0))
    np.testing.assert_array_equal(row_only, row)


@shapes
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_sum_exp(tile: Any, dtype: str, shape: tuple[int, int], beta: float) -> None:
    s = strided(random(*shape, dtype=dtype))
    s[0, -1] = NONE
    ref = dtype_of(dtype)(3.0)
    beta = float(dtype_of(dtype)(beta))
    e = np.exp((exact(s) - 3) * beta)
    row, col = new(shape[0], dtype=dtype), new(shape[1], dtype=dtype)
    tile.sum_exp(s, beta, ref, row, col)
    # an argument of size 23 is rounded before its exponential is taken
    assert_close(row, e.sum(1), sum_bound(dtype, shape[1]) + 23 * eps(dtype))
    assert_close(col, e.sum(0), sum_bound(dtype, shape[0]) + 23 * eps(dtype))

    refs, row = s.max(1).copy(), new(shape[0], dtype=dtype)
    tile.sum_exp_rows(s, beta, refs, row)
    own = np.where(refs == NONE, 0, refs)
    truth = np.exp((exact(s) - own[:, None]) * beta).sum(1)
    assert_close(row, truth, sum_bound(dtype, shape[1]) + 23 * eps(dtype))

    refs, col = s.max(0).copy(), new(shape[1], dtype=dtype)
    tile.sum_exp_cols(s, beta, refs, col)
    own = np.where(refs == NONE, 0, refs)
    truth = np.exp((exact(s) - own) * beta).sum(0)
    assert_close(col, truth, sum_bound(dtype, shape[0]) + 23 * eps(dtype))
    assert (margin(s) == UNTOUCHED).all()


@shapes
def test_exp_rows(tile: Any, dtype: str, shape: tuple[int, int]) -> None:
    values = random(*shape, dtype=dtype)
    values[0, :] = NONE
    s, refs = strided(values), values.max(1)
    start = random(shape[0], low=0, high=2, dtype=dtype)
    total = start.copy()
    tile.exp_rows(s, refs, total)
    truth = np.exp(exact(values) - np.where(refs == NONE, 0, refs)[:, None])
    assert_close(s, truth, EXP_ERROR[dtype] + 23 * eps(dtype))
    assert_close(total, start + truth.sum(1), sum_bound(dtype, shape[1]) + 23 * eps(dtype))
    assert (margin(s) == UNTOUCHED).all()


@pytest.mark.parametrize("name", ["sum_exp", "sum_exp_rows", "sum_exp_cols", "exp_rows"])
def test_nan_reaches_its_row_and_column_only(tile: Any, dtype: str, name: str) -> None:
    s = np.zeros((3, 40), dtype)
    s[1, 33] = np.nan
    row, col, zeros = np.zeros(3, dtype), np.zeros(40, dtype), np.zeros(40, dtype)
    call = {
        "sum_exp": lambda: tile.sum_exp(s, 1.0, 0.0, row, col),
        "sum_exp_rows": lambda: tile.sum_exp_rows(s, 1.0, zeros[:3], row),
        "sum_exp_cols": lambda: tile.sum_exp_cols(s, 1.0, zeros, col),
        "exp_rows": lambda: tile.exp_rows(s, zeros[:3], row),
    }
    call[name]()
    if name != "sum_exp_cols":
        np.testing.assert_array_equal(np.isnan(row), [False, True, False])
    if name in ("sum_exp", "sum_exp_cols"):
        np.testing.assert_array_equal(np.isnan(col), np.arange(40) == 33)


@pytest.mark.parametrize("n", [1, 7, 16, 33])
def test_merge(tile: Any, dtype: str, n: int) -> None:
    maxima = [random(n, low=-30, high=30, dtype=dtype, seed=seed) for seed in (1, 2)]
    sums = [random(n, low=1, high=100, dtype=dtype, seed=seed) for seed in (3, 4)]
    maxima[0][0], sums[0][0] = NONE, 0  # nothing yet
    maxima[1][-1], sums[1][-1] = NONE, 0  # a tile without a pair
    truth = np.logaddexp(*(exact(m) + np.log(exact(np.maximum(s, 1e-30))) for m, s in zip(maxima, sums)))
    tile.merge(maxima[0], sums[0], maxima[1], sums[1])
    if n == 1:  # nothing with nothing
        assert maxima[0][0] == NONE and sums[0][0] == 0
        return
    assert_close(maxima[0] + np.log(exact(sums[0])), truth, 4 * eps(dtype), np.abs(truth) + 60)


def test_merge_keeps_nan_of_a_row_without_a_number(tile: Any, dtype: str) -> None:
    most, total = np.array([NONE, 2.0], dtype), np.array([0.0, 1.0], dtype)
    tile.merge(most, total, np.array([NONE, NONE], dtype), np.array([np.nan, np.nan], dtype))
    assert np.isnan(total).all()


@pytest.mark.parametrize("n", [1, 8, 17])
def test_rebase(tile: Any, dtype: str, n: int) -> None:
    own, total = random(n, low=-10, high=40, dtype=dtype), random(n, low=0.5, high=2, dtype=dtype)
    own[0] = NONE
    truth = exact(total) * np.exp(40 - exact(np.where(own == NONE, 40, own)))
    tile.rebase(40.0, own, total)
    assert_close(total, truth, EXP_ERROR[dtype] + 60 * eps(dtype))


# weights


@pytest.mark.parametrize("n", [1, 16, 33])
def test_factors(tile: Any, dtype: str, n: int) -> None:
    lse, weight = random(n, low=-20, high=20, dtype=dtype), random(n, low=-2, high=2, dtype=dtype, seed=1)
    truth = exact(weight) * 0.25 * np.exp(1.5 - exact(lse))
    lse[0], weight[0], truth[0] = NONE, np.inf, 0  # an empty row has no gradient, whatever comes from above
    out = new(n, dtype=dtype)
    tile.factors(1.5, lse, weight, 0.25, out)
    assert_close(out, truth, EXP_ERROR[dtype] + 25 * eps(dtype))


@shapes
@pytest.mark.parametrize("add", [False, True], ids=["set", "add"])
def test_weights(tile: Any, dtype: str, shape: tuple[int, int], add: bool) -> None:
    s = strided(random(*shape, dtype=dtype))
    s[0, 0] = NONE
    row, col = random(shape[0], low=-1, high=1, dtype=dtype), random(shape[1], low=-1, high=1, dtype=dtype)
    before = random(*shape, low=-1, high=1, dtype=dtype, seed=2)
    w = strided(before)
    tile.weights(s, w, 0.5, 1.0, row, col, add)
    e = np.exp(exact(s) * 0.5 - 1)
    truth, size = e * (exact(row)[:, None] + col), e * (np.abs(row)[:, None] + np.abs(col))
    truth, size = (truth + before, size + np.abs(before)) if add else (truth, size)
    assert_close(w, truth, EXP_ERROR[dtype] + 15 * eps(dtype), size)
    assert (margin(w) == UNTOUCHED).all() and (margin(s) == UNTOUCHED).all()


@shapes
@pytest.mark.parametrize("sides", ["rows", "cols", "both"])
@pytest.mark.parametrize("form", ["set", "add", "in place"])
def test_weights_wide(tile: Any, dtype: str, shape: tuple[int, int], sides: str, form: str) -> None:
    s = strided(random(*shape, low=-20, high=20, dtype=dtype))
    s[0, :] = NONE
    row, col = random(shape[0], low=-1, high=1, dtype=dtype), random(shape[1], low=-1, high=1, dtype=dtype)
    row_ref, col_ref = 21 + random(shape[0], low=0, high=9, dtype=dtype), 21 + random(shape[1], high=9, dtype=dtype)
    row_ref[0] = NONE
    before = random(*shape, low=-1, high=1, dtype=dtype, seed=2)
    truth, size = np.zeros(shape, np.longdouble), np.zeros(shape, np.longdouble)
    if sides != "cols":
        e = np.exp(exact(s) - np.where(row_ref == NONE, 0, row_ref)[:, None])
        truth, size = truth + row[:, None] * e, size + np.abs(row)[:, None] * e
    if sides != "rows":
        e = np.exp(exact(s) - col_ref)
        truth, size = truth + col * e, size + np.abs(col) * e
    if form == "add":
        truth, size = truth + before, size + np.abs(before)
    w = s if form == "in place" else strided(before)
    row_side = (None, None) if sides == "cols" else (row_ref, row)
    col_side = (None, None) if sides == "rows" else (col_ref, col)
    tile.weights_wide(s, w, 1.0, *row_side, *col_side, form == "add")
    assert_close(w, truth, EXP_ERROR[dtype] + 60 * eps(dtype), size + 1e-30)  # below exp(-70): zero
    assert (margin(w) == UNTOUCHED).all()


# softplus


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_softplus_over_its_range(tile: Any, dtype: str, bias: float) -> None:
    x = np.concatenate([np.linspace(-66, 300, 100_003), np.logspace(-30, 2, 5_001), -np.logspace(-30, 1.8, 5_001)])
    x = x.astype(dtype)[:, None]
    shifted = exact(x + x.dtype.type(bias))[:, 0]
    value, sigmoid = np.logaddexp(np.longdouble(0), shifted), 1 / (1 + np.exp(-shifted))
    total = np.zeros(len(x), dtype)
    tile.softplus(x, bias, total)
    assert_close(total, value, 6 * eps(dtype))
    weight, total, weights = (
        random(len(x), low=-2, high=2, dtype=dtype),
        np.zeros(len(x), dtype),
        np.zeros(len(x), dtype),
    )
    tile.softplus_weights(x, bias, weight, total, weights)
    assert_close(total, value, 6 * eps(dtype))
    assert_close(x[:, 0], weight * sigmoid, 6 * eps(dtype))
    np.testing.assert_array_equal(weights, x[:, 0])


@shapes
def test_softplus_sums(tile: Any, dtype: str, shape: tuple[int, int]) -> None:
    values = random(*shape, low=-9, high=9, dtype=dtype)
    values[0, 0] = NONE
    s, weight = strided(values), random(shape[0], low=0.1, high=2, dtype=dtype)
    start = random(shape[0], low=0, high=2, dtype=dtype, seed=1)
    plain, total, weights = start.copy(), start.copy(), start.copy()
    tile.softplus(s, 0.5, plain)
    tile.softplus_weights(s, 0.5, weight, total, weights)
    x = exact(values) + 0.5
    value, w = start + np.logaddexp(0, x).sum(1), weight[:, None] / (1 + np.exp(-x))
    bound = sum_bound(dtype, shape[1]) + 10 * eps(dtype)
    assert_close(plain, value, bound)
    assert_close(total, value, bound)
    assert_close(s, w, bound)
    assert_close(weights, start + w.sum(1), bound)
    assert (margin(s) == UNTOUCHED).all()


def test_softplus_of_special_numbers(tile: Any, dtype: str) -> None:
    s = np.array([[NONE], [np.inf], [np.nan], [0.0]], dtype)
    plain, total, weights = np.zeros(4, dtype), np.zeros(4, dtype), np.zeros(4, dtype)
    tile.softplus(s, 0.0, plain)
    tile.softplus_weights(s, 0.0, np.ones(4, dtype), total, weights)
    expected = [0, np.inf, np.nan]
    np.testing.assert_array_equal(plain[:3], expected)
    np.testing.assert_array_equal(total[:3], expected)
    np.testing.assert_array_equal(weights, np.array([0, 1, np.nan, 0.5], dtype))


# exclusion, and plain arithmetic


@shapes
@pytest.mark.parametrize("differ", [False, True], ids=["equal", "differ"])
def test_exclude_groups(tile: Any, dtype: str, shape: tuple[int, int], differ: bool) -> None:
    rng = np.random.default_rng(0)
    row, col = (rng.integers(0, 3, n).astype(np.int32) * 0x3FFFFFFF for n in shape)
    values = random(*shape, dtype=dtype)
    s = strided(values)
    tile.exclude_groups(s, row, col, differ)
    np.testing.assert_array_equal(s, np.where((row[:, None] == col) != differ, NONE, values))
    assert (margin(s) == UNTOUCHED).all()


@shapes
def test_exclude_columns(tile: Any, dtype: str, shape: tuple[int, int]) -> None:
    keep = (np.arange(shape[1]) % 3 != 1).astype(np.uint8)
    values = random(*shape, dtype=dtype)
    s = strided(values)
    tile.exclude_columns(s, keep)
    np.testing.assert_array_equal(s, np.where(keep, values, NONE))
    assert (margin(s) == UNTOUCHED).all()


@shapes
def test_arithmetic(tile: Any, dtype: str, shape: tuple[int, int]) -> None:
    a, b = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    factor = random(shape[0], dtype=dtype)
    dst = strided(a)
    tile.add(dst, strided(b))
    np.testing.assert_array_equal(dst, a + b)
    tile.scale_rows(dst, strided(b), factor)
    np.testing.assert_array_equal(dst, factor[:, None] * b)
    assert (margin(dst) == UNTOUCHED).all()
    x, y, z = a[0].copy(), b[0].copy(), b[0].copy()
    truth, size = (exact(x) * y).sum(), (exact(abs(x)) * abs(y)).sum()
    assert_close(np.array(tile.dot(x, y)), truth, eps(dtype) * (2 + len(x) / 4), size)
    tile.axpy(z, 0.5, x)
    assert_close(z, exact(y) + exact(x) / 2, eps(dtype))
    tile.divide(y, 3.0)
    np.testing.assert_array_equal(y, b[0] / y.dtype.type(3))


# load


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("order", ["rows", "columns", "sliced", "expanded"])
@shapes
def test_load_float(tile: Any, dtype: str, shape: tuple[int, int], source: str, order: str) -> None:
    values = random(*shape, dtype=source)
    src = {
        "rows": values,
        "columns": np.asfortranarray(values),
        "sliced": strided(values),
        "expanded": np.broadcast_to(values[:1], shape),
    }[order]
    dst = new(*shape, dtype=dtype)
    tile.load(src, source, dst, 0.5)
    np.testing.assert_array_equal(dst, (0.5 * src.astype(dtype)).astype(dtype))


PATTERNS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("stride", [1, 3], ids=["dense", "strided"])
@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_load_every_16_bit_number(tile: Any, dtype: str, source: str, stride: int) -> None:
    """All 65,536 patterns: normal and subnormal numbers, infinities and NaNs, of either sign."""
    wide = PATTERNS.view(np.float16) if source == "float16" else (PATTERNS.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = wide.astype(dtype)
    src = np.repeat(PATTERNS, stride).reshape(64, -1)[:, ::stride]
    dst = new(64, 1024, dtype=dtype)
    tile.load(src, source, dst, 1.0)
    np.testing.assert_array_equal(dst.ravel(), wide)
    np.testing.assert_array_equal(np.signbit(dst.ravel()), np.signbit(wide))


def dtype_of(name: str) -> Any:
    return np.dtype(name).type


ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("target", ROUNDED)
def test_store_rounds_to_nearest_even(tile: Any, dtype: str, target: str) -> None:
    """Every 16-bit number, the midpoint above it and its neighbours, infinities and NaN: as torch rounds."""
    every = torch.from_numpy(PATTERNS.view(np.int16)).view(ROUNDED[target]).float()
    every = every[every.isfinite()].sort().values
    middle = (every[1:].double() + every[:-1].double()) / 2
    extremes = torch.tensor([np.inf, -np.inf, np.nan, 1e-45, 3.4e38, -3.4e38, 65504.0, 65519.99, 65520.0])
    values = torch.cat([x.float() for x in (every, middle, middle * (1 + 1e-6), middle * (1 - 1e-6), extremes)])
    src = values.numpy().astype(dtype)[None]
    dst = np.zeros(src.shape, np.uint16)
    tile.store(src, target, dst)
    got = torch.from_numpy(dst.view(np.int16)).view(ROUNDED[target])[0]
    torch.testing.assert_close(got, values.to(ROUNDED[target]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", ["float32", "float64"])
def test_store_into_strided_rows(tile: Any, dtype: str, target: str) -> None:
    src = random(5, 17, dtype=dtype)
    dst = np.full((5, 20), 7, target)
    tile.store(src, target, dst)
    np.testing.assert_array_equal(dst[:, :17], src.astype(target))
    assert (dst[:, 17:] == 7).all()


def test_load_bytes(tile: Any, dtype: str) -> None:
    src = np.arange(256, dtype=np.uint8).reshape(4, 64)
    dst = new(4, 64, dtype=dtype)
    tile.load(src, "uint8", dst, 0.5)
    np.testing.assert_array_equal(dst, src * dtype_of(dtype)(0.5))
