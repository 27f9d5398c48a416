# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy against torch's cross-entropy of all logits in float64, however the kernel cuts its work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tokens_linear_cases as cases
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokens_linear_cases import check, evaluate, ours, random_case, sure_case, written_out

from sslkernels import ops
from sslkernels.ops import _linear_cross_entropy as module

# one class, a vector of 16 and its neighbours, strips of 256 to 1,008 for each of two threads
CLASSES = (1, 2, 15, 16, 17, 31, 130, 511, 513, 1025, 2051)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# rows and features; the last two have the gradient of the layer as a sum over chunks where panels are cut
ROWS = {"in the gradient": (11, 12), "again": (90, 12), "then again": (300, 256), "panels": (1300, 8)}


@pytest.fixture(params=["whole", "cut"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A panel for all rows that the gradient's memory does not hold, or what the rule for large layers gives."""
    if request.param == "cut":
        monkeypatch.setattr(module, "PANEL_BYTES", 0)
    yield request.param


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_option(data: st.DataObject, panels: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    rows, depth, classes = draw(st.integers(1, 40)), draw(st.integers(1, 24)), draw(st.sampled_from(CLASSES))
    check(
        random_case(rows, depth, classes, selected=draw(st.sampled_from([0.2, 1.0])), bias=draw(st.booleans())),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.7])),
        z_loss=draw(st.sampled_from([0.0, 1e-4, 0.1])),
    )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=["plain", "smooth"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_every_way_to_keep_the_exponentials(
    shape: tuple[int, int], reduction: str, options: dict[str, float], panels: str
) -> None:
    check(random_case(*shape, 301, selected=1.0), reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, panels: str) -> None:
    for reduction in ("mean", "none"):
        check(random_case(50, 24, 301, dtype), reduction=reduction)


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.float16], ids=str)
def test_mixed_dtypes(other: torch.dtype) -> None:
    case = random_case(50, 24, 301, torch.bfloat16)
    check(case._replace(weight=case.weight.to(other)))
    check(case._replace(input=case.input.to(other)))
    check(case._replace(bias=torch.randn(301, dtype=other)))


def test_strides(panels: str) -> None:
    case = random_case(50, 10, 130)
    wide = torch.randn(130, 21) / 3
    check(case._replace(weight=wide[:, ::2][:, :10]))
    check(case._replace(weight=wide.T.contiguous().T[:, :10]))  # a head stored as (D, V)
    check(case._replace(input=torch.randn(10, 50).T, bias=torch.randn(260)[::2]))
    check(case._replace(input=torch.randn(1, 10).expand(50, 10)))


def test_leading_dimensions() -> None:
    case = random_case(30, 8, 40)
    flat = evaluate(ours, case)
    many = evaluate(ours, case._replace(input=case.input.view(2, 15, 8), target=case.target.view(2, 15)))
    for x, y in zip(flat, many):
        assert torch.equal(x, y.reshape(x.shape))
    rows = ops.linear_cross_entropy(case.input.view(3, 10, 8), case.weight, case.target.view(3, 10), reduction="none")
    one = ops.linear_cross_entropy(case.input[0], case.weight, case.target[0], reduction="none")
    assert rows.shape == (3, 10) and one.shape == ()
    torch.testing.assert_close(rows[0, 0], one)
    # hidden[:, :-1], which cannot be viewed as rows
    hidden = torch.randn(2, 16, 8)
    torch.testing.assert_close(
        ops.linear_cross_entropy(hidden[:, 1:], case.weight, case.target.view(2, 15)),
        F.cross_entropy(hidden[:, 1:].reshape(30, 8) @ case.weight.T, case.target),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("margin", "loss"), [(8.0, 1.0), (15.0, 1e-3), (27.0, 1e-6)])
def test_a_sure_model_keeps_its_digits(margin: float, loss: float, reduction: str, panels: str) -> None:
    """At 1e-6 the probability of the target rounds to one, and lse - target has no digit left."""
    case = sure_case(margin)
    exact = evaluate(written_out, case.to(torch.float64))
    assert 0.1 * loss < exact[0] < 10 * loss
    cotangent = torch.full((24,), 1 / 24) if reduction == "none" else None
    got = evaluate(ours, case, cotangent, reduction=reduction)
    got[0] = got[0].mean()
    logits = F.linear(case.input, case.weight, case.bias)
    bound = max(1e-5, 4 * torch.finfo(torch.float32).eps * float(logits.abs().max()))
    for name, x, e in zip(cases.NAMES, got, exact):
        assert (x - e).norm() <= bound * e.norm(), (name, float((x - e).norm() / e.norm()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("level", [1e4, -1e4])
def test_huge_logits_stay_finite(level: float, reduction: str, panels: str) -> None:
    """Logits of 1e4 that differ by 1e4, and all near 1e4: no exponential overflows, no sum of them vanishes."""
    case = random_case(50, 24, 301)
    check(case._replace(bias=case.bias + level), reduction=reduction, label_smoothing=0.1)  # type: ignore[operator]
    for x in evaluate(ours, case._replace(input=level * case.input), reduction="sum"):
        assert x.isfinite().all()
    check(case._replace(input=level * case.input), reduction=reduction)


def test_a_padded_vocabulary(panels: str) -> None:
    """-inf as a bias leaves a class out; with smoothing it has a part of the target, so the loss is infinite."""
    case = random_case(50, 12, 301)
    assert case.bias is not None
    case.bias[280:] = -torch.inf
    case.target[case.target >= 280] = 3
    for reduction in ("mean", "none"):
        cotangent = torch.rand(50) if reduction == "none" else None
        exact = evaluate(written_out, case.to(torch.float64), cotangent, reduction=reduction)
        for x, e in zip(evaluate(ours, case, cotangent, reduction=reduction), exact):
            torch.testing.assert_close(x.double(), e, rtol=1e-5, atol=1e-6)
    assert ours(case, label_smoothing=0.1) == written_out(case, label_smoothing=0.1) == torch.inf
    case.target[5] = 290
    assert ours(case) == torch.inf
    for x in evaluate(ours, case)[1:]:
        assert x.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_propagate(bad: float, reduction: str, panels: str) -> None:
    """What is not finite in a row that counts, or in the layer, gives NaN where it does in eager."""
    for where in ("input", "weight", "bias"):
        case = random_case(50, 12, 301)
        getattr(case, where)[0] = bad
        cotangent = torch.ones(50) if reduction == "none" else None
        got, want = (evaluate(f, case, cotangent, reduction=reduction) for f in (ours, written_out))
        for name, x, e in zip(cases.NAMES, got, want):
            assert torch.equal(x.isfinite(), e.isfinite()), (where, name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_are_not_read(reduction: str, panels: str) -> None:
    """NaN in them reaches nothing, not even the gradient of the layer, where eager has 0 times NaN."""
    case = random_case(50, 12, 301)
    ignored = case.target == -100
    spoilt = case._replace(input=case.input.masked_fill(ignored[:, None], torch.nan))
    cotangent = torch.rand(50) if reduction == "none" else None
    got, want = (evaluate(ours, x, cotangent, reduction=reduction) for x in (spoilt, case))
    for x, y in zip(got, want):
        assert torch.equal(x, y)
    assert (got[1][ignored] == 0).all()
    if reduction == "none":
        assert (got[0][ignored] == 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts(rows: int, label_smoothing: float) -> None:
    """As torch: a mean of nothing is NaN, its gradients are zero, a sum is zero."""
    case = Case = random_case(max(rows, 1), 7, 9)
    case = Case._replace(input=Case.input[:rows], target=torch.full((rows,), -100))
    for reduction, value in (("mean", torch.nan), ("sum", 0.0), ("none", 0.0)):
        loss, *grads = evaluate(
            ours, case, torch.ones(rows) if reduction == "none" else None, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True)
        assert all((x == 0).all() for x in grads)


def test_an_ignored_class() -> None:
    """ignore_index may be a class: the padding token."""
    case = random_case(50, 12, 9, selected=1.0)
    got, want = (evaluate(f, case, ignore_index=4) for f in (ours, written_out))
    torch.testing.assert_close(got, want)


def test_a_tied_embedding_adds_both_gradients() -> None:
    tokens, target = torch.randint(30, (2, 8)), torch.randint(30, (2, 8))
    grads = []
    for loss in (
        lambda h, w: ops.linear_cross_entropy(h, w, target),
        lambda h, w: F.cross_entropy((h @ w.T).flatten(0, 1), target.flatten()),
    ):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(30, 12)
        loss(embedding(tokens).tanh(), embedding.weight).backward()
        assert embedding.weight.grad is not None
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(*grads)
