# SPDX-License-Identifier: Apache-2.0
"""How exact the contrastive ops are: beside eager PyTorch in one precision, at extreme logits, with NaN and inf."""

from __future__ import annotations

from typing import Any

import contrastive_cases as cases
import pytest
import torch
from contrastive_cases import OPS, POSITIVES
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import Exclude
from sslkernels.reference import contrastive as reference

F32, F64 = torch.float32, torch.float64
INF, NAN = torch.inf, torch.nan
ALL = {**OPS, **POSITIVES}
SEEDS = range(5)


def unit(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape, dtype=F64), dim=1).to(dtype)


def options_for(name: str, n: int, m: int) -> dict[str, Any]:
    """One loss's worth of options: the diagonal left out, as the losses do."""
    op = ALL[name]
    if name == "sampled_logsumexp":
        return {"indices": torch.randint(m, (n, 21)), "mask": torch.rand(n, 21) < 0.9}
    weight = {"weight": torch.rand(n) + 0.5} if name in ("similarity_cross_entropy", "similarity_softplus_sum") else {}
    exclude = Exclude(diagonal=0, period=n // 2) if cases.is_self(op) else Exclude(diagonal=0)
    return {**op.options, "exclude": exclude, **weight}


def relative(result: cases.Result, exact: cases.Truth) -> dict[str, float]:
    return {
        name: cases.norm(error) / (cases.norm(want) or 1.0)
        for name, (error, want) in cases.errors(result, exact.result).items()
    }


def mean_square(draws: list[dict[str, float]]) -> dict[str, float]:
    return {name: (sum(draw[name] ** 2 for draw in draws) / len(draws)) ** 0.5 for name in draws[0]}


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("shape", [(64, 64, 17), (130, 200, 64), (258, 513, 128)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_float32_against_eager(name: str, shape: tuple[int, int, int], scale: float) -> None:
    """Below max(1e-5, 4 eps max|logit|) each time, and over a few draws at most twice eager's and one rounding.

    The cotangents are positive, as those of a loss: with both signs nothing is left of the one number that is the
    gradient of a scale. test_contrastive.py has them, and measures errors against the size of what is added up.
    """
    op, (n, m, d) = ALL[name], shape
    m = n if cases.is_self(op) else m
    eps = torch.finfo(F32).eps
    draws: list[dict[str, float]] = []
    eager_draws: list[dict[str, float]] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        tensors = cases.random_tensors(op, n, m, d, scale=scale, dtypes=[F32])
        options = options_for(name, n, m)
        if "scales" in options:
            options["scales"] = (1.0, 0.25, 0.0)  # no larger than the logit that the bound is made of
        cotangents = cases.cotangents_of(op, tensors, positive=True, **options)
        exact = cases.truth(op, tensors, cotangents, **options)
        found = relative(cases.evaluate(op.ours, tensors, cotangents, **options), exact)
        for result, error in found.items():
            assert error <= max(1e-5, 4 * eps * exact.logit), f"{result}: {error:.2e}"
        draws.append(found)
        eager_draws.append(relative(cases.truth(op, tensors, cotangents, F32, **options).result, exact))
    mine, eager = mean_square(draws), mean_square(eager_draws)
    wrong = {result: (mine[result], eager[result]) for result in mine if mine[result] > 2 * eager[result] + eps}
    assert not wrong, f"errors (ours, eager's) {wrong}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_16_bit_inputs(name: str, dtype: torch.dtype) -> None:
    """Arithmetic is float32: the value's error is that of float32, a gradient's that and one rounding to 16 bits."""
    op, n, m = ALL[name], 66, 66
    tensors = cases.random_tensors(op, n, m, 33, dtypes=[dtype])
    options = options_for(name, n, m)
    cotangents = cases.cotangents_of(op, tensors, **options)
    exact = cases.truth(op, tensors, cotangents, **options)
    for result, error in relative(cases.evaluate(op.ours, tensors, cotangents, **options), exact).items():
        rounding = torch.finfo(dtype).eps / 2 if result in ("q", "k") else 0.0
        assert error <= 1e-5 + rounding, f"{result}: {error:.2e}"


# extremes


def features(kind: str, n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """q, k and scale."""
    q, k = unit(n, d, dtype=dtype), unit(m, d, dtype=dtype)
    if kind == "temperature of a thousandth":
        return q, k, 1000.0
    if kind == "norm of ten thousand":
        return 1e4 * q, 1e4 * k, 1.0
    if kind == "rows far apart":  # log-sum-exps from 0.01 to 600: no tile has one reference for all of its rows
        return q * torch.logspace(-2, 2.8, n, dtype=dtype)[:, None], k, 1.0
    if kind == "columns far apart":
        return q, k * torch.logspace(-2, 2.8, m, dtype=dtype)[:, None], 1.0
    if kind == "very negative":
        direction = unit(1, d, dtype=dtype)
        return direction + 0.01 * q, -1000 * direction + k, 1.0
    return 1e-20 * q, 1e-20 * k, 1.0  # products that are zero in float32


EXTREMES = [
    "temperature of a thousandth",
    "norm of ten thousand",
    "rows far apart",
    "columns far apart",
    "very negative",
    "tiny",
]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("name", ALL)
def test_extreme_logits(name: str, kind: str, dtype: torch.dtype) -> None:
    op, n, m, d = ALL[name], 132, 600, 24
    q, k, scale = features(kind, n, m, d, dtype)
    tensors = {"q": q, "k": k, "scale": torch.tensor(scale, dtype=dtype)}
    tensors |= {"positive": torch.randn(n, dtype=dtype), "bias": torch.tensor(-1.0, dtype=dtype)}
    tensors = {key: x for key, x in tensors.items() if key in op.tensors}
    options = options_for(name, n, n if cases.is_self(op) else m)
    cotangents = cases.cotangents_of(op, tensors, positive=True, **options)
    exact = cases.truth(op, tensors, cotangents, **options)
    # frozen keys have a sweep of their own, whose reference rises as larger logits come
    for wanted in (list(tensors), [name for name in tensors if name != "k"]):
        result = cases.evaluate(op.ours, tensors, cotangents, wanted, **options)
        for x in (*result.outputs, *result.gradients.values()):
            assert x.isfinite().all()
        cases.assert_stable(result, exact, dtype, tensors)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("kept", [True, False], ids=["scores kept", "not kept"])
def test_a_quiet_row_beside_a_loud_one(transposed: bool, kept: bool) -> None:
    """Where a tile has one reference for all rows, what a quiet row has in other tiles must still count.

    Row 0 has 100 in the first tile, row 1 has 41 there once and 29 throughout the second: exp(29 - 100) is flushed.
    """
    k = torch.zeros(1024, 2)
    k[:512, 0], k[:512, 1], k[0, 1], k[512:] = 100, -50, 41, 29
    q = torch.eye(2).requires_grad_(kept)
    want, _ = reference.similarity_logsumexp(torch.eye(2).double(), k.double())
    got = ops.similarity_logsumexp(k, q)[1] if transposed else ops.similarity_logsumexp(q, k)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["two sets", "self"])
def test_a_row_that_a_loud_tile_leaves_out(name: str) -> None:
    """Its sum so far is untouched by a tile in which each of its pairs is excluded, however large the others are."""
    half = 512
    groups = torch.arange(2).repeat_interleave(half)
    x = torch.zeros(2 * half, 2, dtype=F64)
    x[:half, 0], x[half:, 0], x[half:, 1] = 1e-3, 10, 0.1
    options = {"exclude": Exclude(diagonal=0, query_groups=groups, differ=True)}
    if name == "two sets":
        options["exclude"] = options["exclude"]._replace(key_groups=groups)
        got = ops.similarity_logsumexp(x.float(), x.float(), **options)
        want = reference.similarity_logsumexp(x, x, **options)
    else:
        got = (ops.self_similarity_logsumexp(x.float(), **options),)
        want = (reference.self_similarity_logsumexp(x, **options),)
    for result, exact in zip(got, want):
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=0)
    q, k = torch.eye(2), torch.zeros(1024, 2)
    k[512:] = 100
    exclude = Exclude(query_groups=torch.tensor([0, 1]), key_groups=groups)
    want = reference.similarity_logsumexp(q.double(), k.double(), exclude=exclude)[0]
    torch.testing.assert_close(ops.similarity_logsumexp(q, k, 1.0, exclude)[0].double(), want, rtol=1e-6, atol=0)


# NaN and inf


def spoiled(name: str, value: float, which: str) -> tuple[cases.Op, dict[str, Tensor], dict[str, Any]]:
    op, n, m, d = ALL[name], 70, 560, 5
    tensors = cases.random_tensors(op, n, m, d, dtypes=[F32])
    tensors = {key: x.abs() if key in ("q", "k") else x for key, x in tensors.items()}
    x = tensors[which]
    x[(3, 2) if x.ndim == 2 else ... if x.ndim == 0 else 3] = value
    options = options_for(name, n, n if cases.is_self(op) else m)
    if "indices" in options:
        options["indices"][5, 0], options["mask"][5, 0] = 3, True
    return op, tensors, options


@pytest.mark.parametrize(("name", "which"), [(name, which) for name, op in ALL.items() for which in op.tensors])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_nan_and_inf_propagate(name: str, value: float, which: str) -> None:
    """Outputs are NaN, inf and finite where torch.logsumexp and softplus of the same scores are."""
    op, tensors, options = spoiled(name, value, which)
    if "scales" in options:
        options["scales"] = (1.0, 0.25)  # 0 leaves a plain count here, 0 * inf there
    with torch.no_grad():
        want = op.reference({key: x.double() for key, x in tensors.items()}, **options)
        got = op.ours(tensors, **options)
    for i, (x, exact) in enumerate(zip(got, want)):
        torch.testing.assert_close(
            x.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}"
        )


@pytest.mark.parametrize("name", OPS)
def test_nan_stays_with_its_row(name: str) -> None:
    """NaN in one query: gradients are NaN where autograd gives NaN, and nowhere else."""
    op, tensors, options = spoiled(name, NAN, "q")
    if "indices" in options:
        options.pop("mask")
    else:  # what 0 * NaN of a pair left out gives is nobody's business
        options["exclude"] = Exclude()
    cotangents = [torch.ones_like(c) for c in cases.cotangents_of(op, tensors, **options)]
    result = cases.evaluate(op.ours, tensors, cotangents, **options)
    exact = cases.evaluate(op.reference, {k: x.double() for k, x in tensors.items()}, cotangents, **options)
    assert result.gradients["q"][3].isnan().all()
    for key, gradient in result.gradients.items():
        assert torch.equal(gradient.isnan(), exact.gradients[key].isnan()), key


def test_nan_of_a_masked_key_stays_out_of_the_sums() -> None:
    q, k, keep = torch.randn(9, 4), torch.randn(30, 4), torch.rand(30) < 0.5
    spoilt = k.clone()
    spoilt[~keep] = NAN
    exclude = Exclude(key_mask=keep)
    for got, want in zip(
        ops.similarity_logsumexp(q, spoilt, 1.0, exclude), ops.similarity_logsumexp(q, k, 1.0, exclude)
    ):
        assert torch.equal(got, want)
    assert torch.equal(
        ops.similarity_softplus(q, spoilt, 1.0, 0.0, exclude), ops.similarity_softplus(q, k, 1.0, 0.0, exclude)
    )
