# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the tokens' ops in the interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels.triton import tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# losses are exact in 16 bits too; gradients meet slopes that were rounded twice
SLOPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
ALL = [True, True, True]
# rows, features, classes: one of each, tiles of 16 rows and 32 classes and their neighbours, primes
SHAPES = [(1, 1, 1), (5, 3, 2), (16, 16, 32), (17, 17, 33), (37, 23, 101)]


def layer(rows: int, depth: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """input, weight, bias and target; some rows are ignored, the first is not."""
    target = torch.randint(classes, (rows,))
    target[1:][torch.rand(max(rows - 1, 0)) > 0.7] = -100
    return [*(x.to(dtype) for x in (torch.randn(rows, depth), torch.randn(classes, depth) / depth**0.5)),
            torch.randn(classes).to(dtype), target]  # fmt: skip


def compare_all(compare: Callable, operands: list, smoothing: float = 0.0, z: float = 0.0, **more: Any) -> None:
    """The loss with gradients, the rows, and their backward."""
    tolerance = SLOPES[operands[0].dtype] if operands[0].dtype == operands[1].dtype else None
    options = more.get("ignore_index", -100), smoothing, z
    compare("linear_cross_entropy", *operands, *options, False, 0, [False] * 3)
    compare("linear_cross_entropy", *operands, *options, more.get("mean", True), 0, ALL, tolerance=tolerance)
    compare("linear_cross_entropy_rows", *operands, *options)
    stats = torch.ops.sslkernels.linear_cross_entropy_rows(*operands, *options)[1]
    grad = torch.randn(operands[3].shape)
    tolerance = tolerance and 3 * tolerance  # few rows are in a sum
    compare("linear_cross_entropy_rows_backward", grad, *operands, stats, *options, ALL, tolerance=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(compare: Callable, shape: tuple[int, int, int]) -> None:
    compare_all(compare, layer(*shape), smoothing=0.1, z=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(compare: Callable, dtype: torch.dtype) -> None:
    compare_all(compare, layer(21, 18, 70, dtype), mean=False)


def test_chunks(compare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of one tile: the layer's gradient is a sum over three chunks, of which the last has no row that counts."""
    monkeypatch.setattr(tokens, "PANEL_BYTES", 1)
    operands = layer(40, 9, 35)
    operands[3][:] = torch.where(torch.arange(40) % 2 == 0, operands[3].abs() % 35, -100)
    compare_all(compare, operands, z=1e-3)


def test_mixed_dtypes_and_strides(compare: Callable) -> None:
    x, weight, bias, target = layer(18, 17, 40)
    compare_all(compare, [x.bfloat16(), weight, bias, target])
    compare_all(compare, [x.half(), weight.bfloat16(), bias.bfloat16(), target])
    strided = x.T.contiguous().T, torch.randn(40, 34)[:, ::2], torch.randn(80)[::2], target.repeat_interleave(2)[::2]
    compare_all(compare, list(strided), smoothing=0.2)


@pytest.mark.parametrize("mask", [[True, False, False], [False, True, False], [False, False, True]], ids=str)
def test_only_what_is_asked_for(compare: Callable, mask: list[bool]) -> None:
    operands = layer(9, 5, 40)
    compare("linear_cross_entropy", *operands, -100, 0.0, 0.0, True, 0, mask)
    stats = torch.ops.sslkernels.linear_cross_entropy_rows(*operands, -100, 0.0, 0.0)[1]
    compare("linear_cross_entropy_rows_backward", torch.randn(9), *operands, stats, -100, 0.0, 0.0, mask)
    operands[2] = None
    compare("linear_cross_entropy", *operands, -100, 0.0, 0.0, True, 0, [True, True, False])


def test_an_ignored_class(compare: Callable) -> None:
    operands = layer(20, 5, 7)
    operands[3][:] = torch.arange(20) % 7
    compare_all(compare, operands, ignore_index=4)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(compare: Callable, rows: int) -> None:
    x, weight, bias, _ = layer(3, 5, 7)
    operands = x[:rows], weight, bias, torch.full((rows,), -100)
    for mean in (False, True):
        compare("linear_cross_entropy", *operands, -100, 0.1, 0.0, mean, 0, ALL)
    compare_all(compare, list(operands))


def test_ignored_rows_are_not_read(compare: Callable) -> None:
    operands = layer(20, 5, 40)
    operands[0][operands[3] == -100] = torch.nan
    compare_all(compare, operands)


def test_a_target_that_is_no_class() -> None:
    """Its row is NaN, and the layer's gradient, as in the reference; the others' rows stay."""
    for bad in (-1, 40, -(2**63)):
        *operands, target = layer(20, 5, 40)
        target[0], target[1] = bad, 3
        rows, stats = tokens.linear_cross_entropy_rows(*operands, target, -100, 0.0, 0.0)
        assert rows[0].isnan() and rows[1:].isfinite().all()
        options = torch.ones(20), *operands, target, stats, -100, 0.0, 0.0, ALL
        dinput, dweight, dbias = tokens.linear_cross_entropy_rows_backward(*options)
        assert dinput[0].isnan().all() and dinput[1:].isfinite().all()
        assert dweight.isnan().all() and dbias.isnan().all()
        loss, dinput, dweight, _ = tokens.linear_cross_entropy(*operands, target, -100, 0.0, 0.0, True, 0, ALL)
        assert loss.isnan() and dinput[0].isnan().all() and dinput[1:].isfinite().all() and dweight.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite(compare: Callable, where: int, bad: float) -> None:
    operands = layer(9, 5, 40)
    operands[where][0] = bad
    for name, arguments in (
        ("linear_cross_entropy", (*operands, -100, 0.0, 0.0, True, 0, [False] * 3)),
        ("linear_cross_entropy_rows", (*operands, -100, 0.0, 0.0)),
    ):
        compare(name, *arguments)


def test_a_padded_vocabulary(compare: Callable) -> None:
    """-inf as a bias leaves classes out, whole tiles of them too; one of them as a target costs infinity."""
    operands = layer(20, 5, 101)
    operands[2][20:70], operands[3][:] = -torch.inf, torch.arange(20) % 20
    compare_all(compare, operands)
    operands[3][7] = 33
    compare("linear_cross_entropy_rows", *operands, -100, 0.0, 0.0)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_huge_logits(compare: Callable, level: float) -> None:
    """4 eps max|logit| is what float32 logits allow."""
    x, weight, bias, target = layer(20, 5, 40)
    allowed = 8 * torch.finfo(torch.float32).eps * 1e4
    for operands in ((x, weight, bias + level, target), (level * x, weight, bias, target)):
        compare("linear_cross_entropy", *operands, -100, 0.1, 0.0, True, 0, ALL, tolerance=4 * allowed)


def test_a_sure_model_keeps_its_digits(compare: Callable) -> None:
    """At a loss of 1e-6 the probability of the target rounds to one."""
    weight = torch.nn.functional.normalize(torch.randn(101, 16), dim=1)
    target = torch.arange(20) * 5
    operands = weight[target], 26.0 * weight, None, target
    loss = tokens.linear_cross_entropy(*operands, -100, 0.0, 0.0, True, 0, [True, True, False])[0]
    assert 1e-9 < loss < 1e-3
    compare("linear_cross_entropy", *operands, -100, 0.0, 0.0, True, 0, [True, True, False], tolerance=3e-5)


def test_the_same_bits() -> None:
    operands = layer(40, 9, 101, torch.bfloat16)
    arguments = *operands, -100, 0.1, 1e-3, True, 0, ALL
    for x, y in zip(tokens.linear_cross_entropy(*arguments), tokens.linear_cross_entropy(*arguments)):
        assert torch.equal(x, y)


# skip-gram


def words(b: int, k: int, d: int, v: int = 6, w: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Few words: rows come again, and negatives are often the positive."""
    tables = (0.5 * torch.randn(n, d) for n in (v, w))
    ids = torch.randint(v, (b,)), torch.randint(w, (b,)), torch.randint(w, (b, k))
    return *(x.to(dtype) for x in tables), *ids


def compare_skipgram(compare: Callable, operands: tuple[Tensor, ...], reductions: tuple[str, ...]) -> None:
    for reduction in reductions:
        compare("skipgram", *operands, reduction, False, tolerance=2e-5)
        loss, slopes = torch.ops.sslkernels.skipgram(*operands, reduction, False)
        grad = torch.randn_like(loss)
        if reduction == "mean":
            continue  # their slopes are smaller
        for name in ("skipgram_backward", "skipgram_backward_rows"):
            compare(name, grad, slopes, *operands, [True, True])


@pytest.mark.parametrize("shape", [(1, 0, 1), (16, 1, 16), (17, 5, 17), (0, 2, 3)], ids=str)
def test_skipgram(compare: Callable, shape: tuple[int, int, int]) -> None:
    b, k, d = shape
    case = words(max(b, 1), k, d)
    compare_skipgram(compare, (*case[:2], *(x[:b] for x in case[2:])), ("sum", "mean", "none"))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=str)
def test_skipgram_dtypes_and_strides(compare: Callable, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    u, v, inputs, outputs, negatives = words(19, 3, 18)
    ids = inputs.repeat_interleave(2)[::2], outputs.repeat_interleave(2)[::2], negatives.T.contiguous().T
    compare_skipgram(compare, (u.to(dtypes[0]).T.contiguous().T, v.to(dtypes[1]), *ids), ("sum", "none"))


@pytest.mark.parametrize("mask", [[True, False], [False, True]], ids=str)
def test_skipgram_gradients_asked_for(compare: Callable, mask: list[bool]) -> None:
    operands = words(9, 2, 5)
    slopes = torch.ops.sslkernels.skipgram(*operands, "sum", False)[1]
    for name in ("skipgram_backward", "skipgram_backward_rows"):
        compare(name, torch.randn(()), slopes, *operands, mask)


def test_a_word_that_is_none() -> None:
    """Its pair is NaN, and no memory outside of a table is read or written."""
    for bad, place in ((-1, 2), (6, 2), (2**40, 3), (5, 4), (-(2**63), 4)):
        operands = words(9, 2, 5)
        operands[place][4] = bad
        loss, slopes = tokens.skipgram(*operands, "none", False)
        assert loss[4].isnan() and loss[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
        assert slopes[4, 0].isnan()
        dinput, doutput = tokens.skipgram_backward(torch.ones(9), slopes, *operands, [True, True])
        assert dinput.shape == (6, 5) and doutput.shape == (5, 5) and dinput.isnan().any()


def test_skipgram_of_large_scores(compare: Callable) -> None:
    """softplus of +-100 is 100, or 4e-44; infinities in rows that do not count reach nothing."""
    u, v, inputs, outputs, negatives = words(9, 2, 5)
    compare("skipgram", 30 * u, 30 * v, inputs, outputs, negatives, "none", False)
    v[3], outputs[:], negatives[:] = torch.inf, 2, 2
    compare_skipgram(compare, (u, v, inputs, outputs, negatives), ("sum",))
