# SPDX-License-Identifier: Apache-2.0
"""l2_normalize, and two_view_cross_entropy, which normalises, sweeps and differentiates in one call."""

from __future__ import annotations

from typing import Any

import contrastive_cases as cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import ops

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, F64, torch.bfloat16, torch.float16]


def compute(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def relative(x: Tensor, want: Tensor) -> float:
    return cases.norm(x.double() - want.double()) / (cases.norm(want) or 1.0)


def views(counts: list[int], d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"x{i}": (3 * torch.randn(n, d)).to(dtype) for i, n in enumerate(counts)}


# l2_normalize


def normalized(x: dict[str, Tensor], eps: float = 1e-12) -> tuple[Tensor, ...]:
    return (F.normalize(torch.cat(list(x.values())), dim=1, eps=eps),)


def ours(x: dict[str, Tensor], eps: float = 1e-12) -> tuple[Tensor, ...]:
    return (ops.l2_normalize(*x.values(), eps=eps),)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 3, 16, 17, 130]), min_size=1, max_size=4),
    d=st.sampled_from([1, 2, 7, 16, 33, 130]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_l2_normalize(counts: list[int], d: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = views(counts, d, dtype)
    cotangents = [torch.randn(sum(counts), d).to(dtype)]
    result = cases.evaluate(ours, x, cotangents)
    exact = cases.evaluate(normalized, {key: t.double() for key, t in x.items()}, cotangents)
    (z,) = result.outputs
    assert (z.dtype, z.shape, z.is_contiguous()) == (dtype, (sum(counts), d), True)
    eps = torch.finfo(dtype).eps
    assert relative(z, exact.outputs[0]) <= eps + 4 * torch.finfo(compute(dtype)).eps
    for key, gradient in result.gradients.items():
        # the part along z is taken away: what is left is as exact as the part was large
        size = (
            (cotangents[0].double().norm() / x[key].double().norm(dim=1).clamp(min=1e-12).min()) if len(x[key]) else 0
        )
        error = cases.norm(gradient.double() - exact.gradients[key])
        assert error <= (4 * eps + 8 * torch.finfo(compute(dtype)).eps) * float(size), key


def test_l2_normalize_of_strided_rows() -> None:
    room = torch.full((40, 20), torch.nan)
    x = {
        "x0": room[::4, 2:9].copy_(torch.randn(10, 7)),
        "x1": torch.randn(7, 5).t(),
        "x2": torch.randn(1, 7).expand(6, 7),
    }
    cotangents = [torch.randn(21, 7)]
    result, expected = cases.evaluate(ours, x, cotangents), cases.evaluate(normalized, x, cotangents)
    torch.testing.assert_close(result.outputs, expected.outputs)
    torch.testing.assert_close(result.gradients, expected.gradients)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_rows_shorter_than_eps_are_divided_by_it(dtype: torch.dtype) -> None:
    x = {"x0": torch.tensor([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]], dtype=dtype)}
    cotangents = [torch.randn(3, 2)]
    for eps in (1e-12, 1e-2):
        result, expected = (
            cases.evaluate(ours, x, cotangents, eps=eps),
            cases.evaluate(normalized, x, cotangents, eps=eps),
        )
        torch.testing.assert_close(result.outputs, expected.outputs)
        torch.testing.assert_close(result.gradients["x0"][1:], expected.gradients["x0"][1:])
    assert not result.outputs[0][0].any()


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e25, 1e38])
def test_rows_whose_squares_leave_float32(size: float) -> None:
    x = (size * F.normalize(torch.randn(9, 5, dtype=F64))).float()
    z = ops.l2_normalize(x, eps=1e-36)
    torch.testing.assert_close(z.double(), F.normalize(x.double(), eps=1e-36), rtol=1e-6, atol=1e-6)


def test_a_row_with_nan_or_inf_stays_alone() -> None:
    x = torch.randn(5, 3)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    z = ops.l2_normalize(x)
    assert z[1].isnan().all() and z[3, 0].isnan() and z[[0, 2, 4]].isfinite().all()


def test_l2_normalize_gradcheck() -> None:
    x = [torch.randn(n, 3, dtype=F64, requires_grad=True) for n in (2, 1, 3)]
    assert torch.autograd.gradcheck(lambda *x: ops.l2_normalize(*x), x)


def test_l2_normalize_where_one_view_has_a_gradient() -> None:
    x = cases.leaves(views([3, 4], 5, F64), ["x1"])
    (got,) = torch.autograd.grad(ours(x)[0][:, 0].sum(), x["x1"])
    (want,) = torch.autograd.grad(normalized(x)[0][:, 0].sum(), x["x1"])
    torch.testing.assert_close(got, want)


# two_view_cross_entropy


def definition(x: dict[str, Tensor], weight: Any = 1.0, decoupled: bool = False) -> tuple[Tensor, ...]:
    z, scale = F.normalize(torch.cat([x["x0"], x["x1"]])), x["scale"]
    n, rows = len(z) // 2, torch.arange(len(z))
    s = scale * z @ z.T
    lse = cases.logsumexp(s.masked_fill((rows[:, None] - rows) % n == 0, -torch.inf), 1)
    positive = s[rows, rows.roll(n)]
    margin = lse - positive
    return ((weight * (margin if decoupled else cases.softplus(margin))).sum(), lse, positive)


def fused(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    return ops.two_view_cross_entropy(x["x0"], x["x1"], x["scale"], **options)


@pytest.mark.parametrize("decoupled", [False, True], ids=["softplus", "decoupled"])
@pytest.mark.parametrize("n", [2, 17, 64, 65, 140])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_view_cross_entropy(dtype: torch.dtype, n: int, decoupled: bool, threads: int) -> None:
    """16-bit rows are rounded again once they have unit length, so the bound is that of 16-bit losses."""
    x = {**views([n, n], 33, dtype), "scale": torch.tensor(5.0, dtype=compute(dtype))}
    options: dict[str, Any] = {"weight": torch.rand(2 * n), "decoupled": decoupled}
    truth = {key: t.double() for key, t in x.items()}
    one = [torch.tensor(1.0)]
    result = cases.evaluate(lambda *a, **o: fused(*a, **o)[:1], x, one, **options)
    exact = cases.evaluate(lambda *a, **o: definition(*a, **o)[:1], truth, one, **options)
    wide = dtype in (F32, F64)
    bound = 84 * torch.finfo(dtype).eps if wide else 1e-2
    assert relative(result.outputs[0], exact.outputs[0]) <= bound
    for key, gradient in result.gradients.items():
        assert gradient.dtype == x[key].dtype
        want = exact.gradients[key]
        assert cases.norm(gradient.double() - want) <= (bound if wide else 2e-2) * max(cases.norm(want), 1.0), key
    with torch.no_grad():
        got, want = fused(x, **options), definition(truth, **options)
    for found, expected in zip(got, want):
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=5 * bound)
    assert got[3].shape == got[1].shape


def test_a_single_pair_has_no_negative() -> None:
    x = {**views([1, 1], 5, F32), "scale": torch.tensor(5.0)}
    result = cases.evaluate(lambda x: fused(x)[:1], x, [torch.tensor(1.0)])
    assert result.outputs[0] == 0
    assert not any(gradient.any() for gradient in result.gradients.values())


@pytest.mark.parametrize(
    "wanted", [[], ["x0"], ["x1"], ["scale"], ["x0", "scale"], ["x0", "x1", "scale"]], ids="+".join
)
def test_gradients_where_wanted(wanted: list[str]) -> None:
    x = {**views([9, 9], 5, F64), "scale": torch.tensor(5.0, dtype=F64)}
    one = [torch.tensor(1.0)]
    result = cases.evaluate(lambda *a: fused(*a)[:1], x, one, wanted)
    exact = cases.evaluate(lambda *a: definition(*a)[:1], x, one, wanted)
    torch.testing.assert_close(result.outputs, exact.outputs)
    torch.testing.assert_close(result.gradients, exact.gradients)


def test_two_view_cross_entropy_gradcheck() -> None:
    x = {**views([3, 3], 4, F64), "scale": torch.tensor(2.0, dtype=F64)}
    inputs = cases.leaves(x, list(x))
    assert torch.autograd.gradcheck(lambda *v: fused(dict(zip(x, v)))[0], tuple(inputs.values()))


def test_double_backward_is_refused() -> None:
    x = cases.leaves({**views([3, 3], 4, F32), "scale": torch.tensor(2.0)}, ["x1"])
    (gradient,) = torch.autograd.grad(fused(x)[0], x["x1"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.norm().backward()


def test_one_graph() -> None:
    x = {**views([6, 6], 5, F32), "scale": torch.tensor(5.0)}
    one = [torch.tensor(1.0)]
    compiled = torch.compile(lambda x: fused(x)[:1], fullgraph=True, backend="aot_eager")
    got, want = cases.evaluate(compiled, x, one), cases.evaluate(lambda x: fused(x)[:1], x, one)
    torch.testing.assert_close(got.outputs, want.outputs)
    torch.testing.assert_close(got.gradients, want.gradients)
