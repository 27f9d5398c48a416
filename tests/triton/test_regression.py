# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the regression ops in the interpreter, against the reference.

A program has 32 elements there: rows of 5 come in fours, of 33 and more alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.reference import _regression as reference
from sslkernels.triton import regression

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = (
    ("smooth_l1", 0.7, True, 1e-5), ("smooth_l1", 0.0, False, 1e-5), ("l1", 1.0, True, 1e-5), ("l2", 1.0, True, 1e-5),
    ("cosine", 1.0, False, 1e-8), ("normalized_l2", 1.0, False, 1e-6),
)  # fmt: skip


def check(compare: Callable, pred: Tensor, target: Tensor, index: Tensor | None, options: tuple, **other) -> None:
    """The sum or the mean, the rows, and the rows' backward."""
    arguments = pred, target, index, *options
    for mean, need_gradient in ((True, True), (False, False)):
        compare("masked_regression", *arguments, 1.5, mean, need_gradient, **other)
    compare("masked_regression_rows", *arguments, **other)
    compare("masked_regression_rows_backward", torch.randn(pred.shape[:-1]), *arguments, **other)


@pytest.mark.parametrize("options", LOSSES, ids=lambda x: f"{x[0]}-{x[1]}")
@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 5), (2, 3, 2, 33), (9, 32)], ids=str)
def test_losses_and_shapes(compare: Callable, shape: tuple[int, ...], options: tuple) -> None:
    pred, target = torch.randn(shape), 3 * torch.randn(shape) + 1
    target[:1] = pred[:1]
    if options[0] in ("cosine", "normalized_l2"):
        pred.flatten(0, -2)[-1] = 0.0  # shorter than eps
        target.flatten(0, -2)[1] = 1e-9
        if shape[-1] == 1:  # unit rows are +-1: their gradient is the rounding of 0
            return
    check(compare, pred, target, None, options)


@pytest.mark.parametrize("dtypes", [DTYPES[1:2] * 2, DTYPES[2:] * 2, DTYPES[:2], DTYPES[:0:-1]], ids=str)
@pytest.mark.parametrize("options", LOSSES[::3], ids=lambda x: f"{x[0]}-{x[1]}")
def test_dtypes(compare: Callable, options: tuple, dtypes: tuple[torch.dtype, ...]) -> None:
    pred, target = (torch.randn(5, 19).to(dtype) for dtype in dtypes)
    check(compare, pred, target, None, options)


@pytest.mark.parametrize("options", LOSSES[::2], ids=lambda x: f"{x[0]}-{x[1]}")
def test_ids(compare: Callable, options: tuple) -> None:
    target = torch.randn(2, 7, 9)
    check(compare, torch.randn(2, 3, 2, 9), target, torch.randint(7, (2, 3, 2)), options)
    ids = torch.randint(7, (5, 2)).T
    check(compare, torch.randn(9, 5, 2).permute(2, 1, 0), target.mT.contiguous().mT, ids, options)


@pytest.mark.parametrize("outside", [-1, 7, 2**40])
@pytest.mark.parametrize("options", LOSSES[::2], ids=lambda x: f"{x[0]}-{x[1]}")
def test_an_id_outside_makes_its_row_nan(compare: Callable, options: tuple, outside: int) -> None:
    ids = torch.randint(7, (2, 5))
    ids[1, 3] = outside
    pred, target = torch.randn(2, 5, 9), torch.randn(2, 7, 9)
    check(compare, pred, target, ids, options)
    rows = regression.masked_regression_rows(pred, target, ids, *options)
    assert rows.isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("options", LOSSES[::2], ids=lambda x: f"{x[0]}-{x[1]}")
@pytest.mark.parametrize("kept", ["some", "all", "none"])
def test_mask(compare: Callable, options: tuple, kept: str) -> None:
    """What is left out is not read: it may be NaN. The mean of nothing is NaN."""
    mask = torch.full((3, 7), kept == "all")
    if kept == "some":
        mask[::2, 1::3] = True
    pred, target = torch.randn(3, 7, 9), torch.randn(3, 7, 9)
    pred[~mask], target[~mask] = torch.nan, torch.inf
    check(compare, pred, target, mask.T.contiguous().T, options)


def test_strides(compare: Callable) -> None:
    """Rows in three and in four dimensions that memory tells apart, columns that are not next to each other."""
    for options in (LOSSES[0], LOSSES[4]):
        pred = torch.randn(9, 2, 4, 3).permute(1, 2, 3, 0)
        check(compare, pred, torch.randn(2, 4, 3, 18)[..., ::2], None, options)
        check(compare, pred, torch.randn(9).expand(2, 4, 3, 9), None, options)
        wide = torch.randn(2, 3, 2, 2, 2, 9)[:, :, :, 0].permute(3, 1, 2, 0, 4)
        check(compare, wide[..., 1:], torch.randn(2, 3, 2, 2, 8), None, options)


def test_nan_and_extremes(compare: Callable) -> None:
    for options in LOSSES:
        pred, target = torch.randn(6, 9), torch.randn(6, 9)
        pred[0, 2] = target[1, 3] = torch.nan
        check(compare, pred, target, None, options)
    for options in LOSSES[4:]:
        pred, target = torch.randn(6, 9), torch.randn(6, 9)
        pred[1] *= 1e25  # its square leaves float32
        target[2] *= 1e-25
        compare("masked_regression_rows", pred, target, None, *options)
        pred[3:] = target[3:] + 1e-4 * torch.randn(3, 9)
        compare("masked_regression_rows", pred[3:], target[3:], None, *options, tolerance=1e-3)


def test_empty(compare: Callable) -> None:
    for options in LOSSES[:1]:
        check(compare, torch.ones(2, 0, 5), torch.ones(2, 0, 5), None, options)
        check(compare, torch.ones(2, 0, 5), torch.ones(2, 3, 5), torch.ones(2, 0, dtype=torch.int64), options)
        check(compare, torch.ones(0, 5), torch.ones(0, 5), torch.ones(0, dtype=torch.bool), options)


def test_repeatable() -> None:
    pred, target, mask = torch.randn(40, 9), torch.randn(40, 9), torch.rand(40) < 0.5
    runs = [regression.masked_regression(pred, target, mask, *LOSSES[0], 1.0, True, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_rows_wider_than_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "WIDEST", 8)
    pred, target = torch.randn(3, 9), torch.randn(3, 9)
    got = regression.masked_regression(pred, target, None, *LOSSES[0], 1.0, True, True)
    for a, b in zip(got, reference.forward(pred, target, None, *LOSSES[0], 1.0, True, True)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("instance_norm", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_average_layers(compare: Callable, instance_norm: bool, layer_norm: bool) -> None:
    """More layers than one launch takes, of two dtypes and of other strides; rows beyond a tile."""
    layers = [torch.randn(2, 6, 9) + 1 for _ in range(5)]
    layers += [torch.randn(2, 6, 9).bfloat16(), torch.randn(9, 6, 2).permute(2, 1, 0)]
    options = instance_norm, layer_norm, 1e-5
    for some in (layers, layers[:1], layers[-1:]):
        compare("average_layers", some, *options)
    compare("average_layers", [torch.ones(2, 0, 9)], *options)
    compare("average_layers", [torch.ones(0, 3, 9)] * 2, *options)
