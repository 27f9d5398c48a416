# SPDX-License-Identifier: Apache-2.0
"""masked_regression against the losses of I-JEPA, V-JEPA, data2vec 2.0, BYOL and SimSiam, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import regression_cases as cases
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from regression_cases import COSINES, LOSSES, Case, check, random_case

from sslkernels import ops

# one element, primes, a vector of 16 and its neighbours, several vectors
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 33, 64, 67, 384)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    lead = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    loss = draw(st.sampled_from(LOSSES))
    rows = draw(st.sampled_from(["ids", "mask", "all"]))
    width = draw(st.sampled_from(WIDTHS))
    dtypes = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 99)))
    options = {
        "loss": loss,
        "beta": draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
        "normalize_target": loss not in COSINES and width > 1 and draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.25, -3.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    case = random_case(lead, draw(st.integers(1, 9)), width, rows=rows, dtypes=dtypes)
    if case.mask is not None:
        case.mask.view(-1)[0] = True  # a mean over nothing has a test of its own
    check(case, torch.randn(lead) if options["reduction"] == "none" else None, **options)


ORIGINALS: dict[str, dict[str, Any]] = {
    "I-JEPA": {"loss": "smooth_l1", "normalize_target": True},
    "V-JEPA": {"loss": "l1", "normalize_target": True},
    "data2vec 2.0": {"loss": "l2", "scale": 64**0.5},
    "data2vec 2.0 smooth": {"loss": "smooth_l1", "beta": 0.25, "scale": 64**0.5},
    "BYOL": {"loss": "normalized_l2"},
    "SimSiam": {"loss": "cosine"},
}


def original(name: str, p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The loss of each repository, pred and its gathered target given."""
    if name == "I-JEPA":
        return F.smooth_l1_loss(p, F.layer_norm(t, t.shape[-1:]))
    if name == "V-JEPA":
        return ((p - F.layer_norm(t, t.shape[-1:])).abs() ** 1 / 1).mean()
    if name.startswith("data2vec"):
        difference = (p - t).flatten(0, -2)
        square = difference**2
        if name.endswith("smooth"):
            far = difference.abs()
            square = torch.where(far < 0.25, 0.5 * far**2 / 0.25, far - 0.125)
        return (square.sum(-1) / 64**0.5).sum() / len(difference)
    if name == "BYOL":
        u, v = (x / x.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt() for x in (p, t))
        return (u - v).square().sum(-1).mean()
    return 1 - F.cosine_similarity(p, t, dim=-1).mean()


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals(name: str) -> None:
    """Four overlapping blocks of each sample, as I-JEPA has them; the value of each original's own formula."""
    case = random_case((2, 4, 7), 20, 64, dtypes=(torch.float64, torch.float64))
    assert case.ids is not None
    gathered = torch.stack([t[i] for t, i in zip(case.target, case.ids)])
    torch.testing.assert_close(cases.ours(case, **ORIGINALS[name]), original(name, case.pred, gathered))
    check(case.to(torch.float32), **ORIGINALS[name])


@pytest.mark.parametrize("loss", LOSSES)
def test_values_by_hand(loss: str) -> None:
    pred, target = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.5], [1.0, 0.0]])
    expected = {
        "smooth_l1": [(2.5 + 0.125) / 2, (0.5 + 0.5) / 2],
        "l1": [1.75, 1.0],
        "l2": [4.625, 1.0],
        "cosine": [1.0, 1.0],
        "normalized_l2": [2.0, 2.0],
    }[loss]
    rows = ops.masked_regression(pred, target, loss=loss, reduction="none")
    assert rows.tolist() == pytest.approx(expected)
    assert ops.masked_regression(pred, target, loss=loss).item() == pytest.approx(sum(expected) / 2)
    assert ops.masked_regression(pred, target, loss=loss, reduction="sum").item() == pytest.approx(sum(expected))
    mask = torch.tensor([False, True])
    assert ops.masked_regression(pred, target, mask=mask, loss=loss).item() == pytest.approx(expected[1])


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values otherwise in memory."""
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(x.dtype)
    wide[..., ::2] = x
    padded = torch.randn(x.shape[0], x.shape[1] + 2, *x.shape[2:]).to(x.dtype)
    padded[:, 1:-1] = x
    return {
        "every other column": wide[..., ::2],
        "slice": padded[:, 1:-1],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "features first": x.movedim(-1, 1).contiguous().movedim(1, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1)))
def test_strides(layout: str, loss: str, dtype: torch.dtype) -> None:
    case = random_case((3, 2, 5), 11, 37, dtypes=(dtype, dtype))
    moved = case._replace(pred=layouts(case.pred)[layout], target=layouts(case.target)[layout])
    assert moved.pred.stride() != case.pred.stride() and moved.target.stride() != case.target.stride()
    for reduction in ("mean", "none"):
        for x, y in zip(
            cases.evaluate(cases.ours, moved, loss=loss, reduction=reduction),
            cases.evaluate(cases.ours, case, loss=loss, reduction=reduction),
        ):
            assert torch.equal(x, y)


def test_expanded_target() -> None:
    """One target for the whole batch, repeated without a copy."""
    case = random_case((3, 4), 6, 17)
    shared = case.target[:1].expand(3, -1, -1)
    assert shared.stride(0) == 0
    check(case._replace(target=shared), normalize_target=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 5)])
def test_no_rows(shape: tuple[int, ...], loss: str) -> None:
    pred, target = torch.randn(shape, requires_grad=True), torch.randn(shape[0], 4, shape[2])
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    assert ops.masked_regression(pred, target, ids, loss=loss).isnan()
    assert ops.masked_regression(pred, target, ids, loss=loss, reduction="none").shape == shape[:2]
    total = ops.masked_regression(pred, target, ids, loss=loss, reduction="sum")
    total.backward()
    assert total == 0 and pred.grad is not None and pred.grad.shape == shape


def test_mask_of_nothing() -> None:
    """A mean over nothing is NaN, as torch's; what nobody compares has no gradient."""
    case = random_case((2, 3), 0, 5, rows="mask")
    assert case.mask is not None
    value, grad = cases.evaluate(cases.ours, case._replace(mask=torch.zeros_like(case.mask)))
    assert value.isnan() and not grad.any()


def test_rows_that_do_not_count_are_not_read() -> None:
    case = random_case((2, 9), 0, 5, rows="mask")
    assert case.mask is not None
    pred, target = (x.masked_fill(~case.mask[..., None], torch.nan) for x in case[:2])
    for reduction in ("mean", "sum", "none"):
        for x, y in zip(
            cases.evaluate(cases.ours, Case(pred, target, mask=case.mask), reduction=reduction),
            cases.evaluate(cases.ours, case, reduction=reduction),
        ):
            assert torch.equal(x, y)
    ids = torch.tensor([[1, 3]])
    spoiled = torch.full((1, 6, 5), torch.nan)
    spoiled[:, [1, 3]] = torch.randn(2, 5)
    value = ops.masked_regression(torch.randn(1, 2, 5), spoiled, ids, normalize_target=True)
    assert value.isfinite()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_finite_shows(loss: str, bad: float) -> None:
    """In its own row, as in the written-out formula, and in the mean."""
    for spoil in ("pred", "target"):
        case = random_case((2, 3), 0, 21, rows="all")
        getattr(case, spoil)[1, 1, 7] = bad
        rows, exact = (f(case, loss=loss, reduction="none") for f in (cases.ours, cases.written_out))
        assert torch.equal(rows.isfinite(), exact.isfinite()) and not rows[1, 1].isfinite()
        assert not cases.ours(case, loss=loss).isfinite()
        if bad != bad:
            _, grad = cases.evaluate(cases.ours, case, loss=loss)
            assert grad[1, 1].isnan().any() and grad[0].isfinite().all()
