# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the contrastive ops in the interpreter, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels.triton import _gradients, _launch, _lse, _panel, contrastive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NOTHING = (None, None, None, None, None, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 33), (0, 4)])
def test_l2_normalize(compare: Callable, rows: int, columns: int, dtype: torch.dtype) -> None:
    xs = [torch.randn(rows, columns).to(dtype), torch.randn(columns, 2 * rows).to(dtype).T]
    for x in xs:
        x[:1] = 0.0  # shorter than eps
    xs[1][1:2] = torch.nan
    compare("l2_normalize", xs, 1e-12)
    z, norm = torch.ops.sslkernels.l2_normalize(xs, 1e-12)
    compare("l2_normalize_backward", torch.randn(columns, 3 * rows).to(dtype).T, z, norm, 1e-12)


def doubled(x: object) -> object:
    return x.double() if isinstance(x, Tensor) else x


def features(n: int, m: int, d: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of unit length, the second matrix with every second element of a larger one's columns."""
    q = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    k = torch.nn.functional.normalize(torch.randn(m, d), dim=1)
    return q.to(dtypes[0]), k.T.repeat_interleave(2, 1).to(dtypes[-1]).T[::2]


def loosest(*dtypes: torch.dtype) -> float:
    """Of gradients and sums of 16-bit weights, whichever dtype they come out in."""
    return max(TOLERANCE[dtype] for dtype in dtypes)


# the interpreter's tiles are 32 x 16, with all features up to 32 and pieces of 16 beyond; 300 keys are split
SIZES = [(1, 1, 1), (31, 17, 3), (32, 16, 16), (33, 33, 32), (31, 16, 33), (5, 300, 8), (5, 100, 48), (70, 7, 50)]
ALL = (True, True, True)


def check_logsumexp(
    compare: Callable,
    q: Tensor,
    k: Tensor,
    scale: tuple = (None, 3.0),
    rules: tuple = NOTHING,
    scales: tuple = (1.0,),
    offset: int | None = None,
    mask: tuple = ALL,
    asked: tuple = ALL,
    tolerance: float | None = None,
) -> None:
    """Forward, and backward from what the reference leaves; `asked`: rows, columns, positives."""
    _, columns, positives = asked
    compare("similarity_logsumexp", q, k, *scale, *rules, scales, columns, True, offset)
    row, col, positive, *_ = torch.ops.sslkernels.similarity_logsumexp(
        q, k, *scale, *rules, scales, columns, False, offset
    )
    grad_row, grad_col = (torch.randn(x.shape[::-1]).T if wanted else None for x, wanted in zip((row, col), asked))
    grad_positive = torch.randn(2 * positive.numel())[::2] if offset is not None and positives else None
    grads = grad_row, grad_col, grad_positive
    saved = row, col, q.new_empty(0), mask
    tolerance = tolerance or loosest(q.dtype, k.dtype)
    compare("similarity_logsumexp_backward", *grads, q, k, *scale, *rules, scales, offset, *saved, tolerance=tolerance)


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_logsumexp(compare: Callable, n: int, m: int, d: int) -> None:
    check_logsumexp(compare, *features(n, m, d, torch.float32))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 5, 0)], ids=str)
def test_logsumexp_of_nothing(compare: Callable, sizes: tuple) -> None:
    q, k = features(*sizes, torch.float32)
    check_logsumexp(compare, q, k)
    compare("similarity_row_attention", q, k, None, 3.0, *NOTHING)
    check_self(compare, q)


@pytest.mark.parametrize("d", [20, 40])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_logsumexp_dtypes(compare: Callable, dtypes: tuple, d: int) -> None:
    q, k = features(18, 35, d, *dtypes)
    scale = torch.tensor([4.0], dtype=dtypes[0])
    check_logsumexp(compare, q, k, (scale, 1.0), (2, *NOTHING[1:]), offset=2)


def rules(n: int, m: int) -> dict[str, tuple]:
    # labels that differ above bit 32 alone
    groups = torch.randint(4, (n,)) << 32, (torch.randint(4, (2 * m,)) << 32)[::2]
    mask = torch.rand(m) < 0.7
    return {
        "diagonal": (3, None, None, None, None, False),
        "below": (-n + 1, None, None, None, None, False),
        "beyond": (1 << 61, None, None, None, None, False),
        "period": (-2, 7, None, None, None, False),
        "long period": (1, 1 << 40, None, None, None, False),
        "groups": (None, None, *groups, None, False),
        "differ": (0, None, *groups, mask, True),
        "nothing left": (None, None, None, None, torch.zeros(m, dtype=torch.bool), False),
    }


@pytest.mark.parametrize("d", [5, 33])
@pytest.mark.parametrize("rule", rules(1, 1))
def test_logsumexp_rules(compare: Callable, rule: str, d: int) -> None:
    q, k = features(19, 34, d, torch.float32)
    check_logsumexp(compare, q, k, rules=rules(19, 34)[rule])


@pytest.mark.parametrize("d", [7, 40])
@pytest.mark.parametrize("scales", [(0.5,), (1.0, 2.0), (1.0, 0.0, 3.0)], ids=str)
def test_logsumexp_scales(compare: Callable, scales: tuple, d: int) -> None:
    q, k = features(17, 21, d, torch.float32)
    check_logsumexp(compare, q, k, (torch.tensor(2.0), 1.0), (0, *NOTHING[1:]), scales, offset=0)


@pytest.mark.parametrize("d", [7, 40])
@pytest.mark.parametrize(
    ("asked", "mask"),
    [
        ((True, False, False), (True, False, False)),
        ((False, True, False), (False, True, True)),
        ((False, False, True), ALL),
        ((True, True, True), (False, False, True)),
        ((True, False, True), (False, True, False)),
    ],
    ids=str,
)
def test_logsumexp_of_what_is_asked(compare: Callable, asked: tuple, mask: tuple, d: int) -> None:
    q, k = features(17, 21, d, torch.float32)
    check_logsumexp(compare, q, k, offset=4, asked=asked, mask=mask)


@pytest.mark.parametrize("d", [64, 512])
def test_a_column_major_queue_is_read_by_rows(d: int) -> None:
    q, k = torch.empty(64, d, device="meta"), torch.empty(d, 300, device="meta").T
    with _launch.record("sm_90") as calls:
        contrastive.similarity_row_attention(q, k, None, 1.0, *NOTHING)
        row, *_ = contrastive.similarity_logsumexp(q, k, None, 1.0, *NOTHING, (1.0,), False, False, None)
        rest = (1.0,), None, row, row, row, ALL
        contrastive.similarity_logsumexp_backward(row, None, None, q, k, None, 1.0, *NOTHING, *rest)
        contrastive.similarity_softplus(q, k, None, 1.0, None, 1.0, *NOTHING)
        contrastive.similarity_softplus_backward(row[0], q, k, None, 1.0, None, 1.0, *NOTHING, (True,) * 4)
    read = [x for call in calls for x in call.arguments if isinstance(x, Tensor) and x.shape == k.shape]
    assert read
    assert all(x.stride(1) == 1 for x in read)


@pytest.mark.parametrize("d", [64, 512])
def test_nothing_is_launched_for_no_gradient(d: int) -> None:
    z, grad = torch.empty(300, d, dtype=torch.bfloat16, device="meta"), torch.empty(1, 300, device="meta")
    options, number = (None, 1.0, *NOTHING), torch.empty((), device="meta")
    with _launch.record("sm_90") as calls:
        found = (
            contrastive.similarity_logsumexp_backward(
                grad, grad, None, z, z, *options, (1.0,), None, grad, grad, number, (False,) * 3
            ),
            contrastive.self_similarity_logsumexp_backward(
                grad, None, z, None, 1.0, 0, None, None, None, False, (1.0,), None, grad, number, (False,) * 2
            ),
            contrastive.similarity_softplus_backward(grad[0], z, z, None, 1.0, None, 1.0, *NOTHING, (False,) * 4),
        )
    assert not calls
    assert not any(x.numel() for xs in found for x in xs)


@pytest.mark.parametrize("d", [8, 40])
def test_logsumexp_of_extremes(compare: Callable, d: int) -> None:
    """Logits of 1e4 beside such of 1, then what is not finite: each row and column has its own reference."""
    q, k = features(20, 35, d, torch.float32)
    q[3] *= 100.0
    k[20] *= 10.0
    tolerance = 4 * torch.finfo(torch.float32).eps * 10 * (q @ k.T).abs().max().item()
    check_logsumexp(compare, q, k, (None, 10.0), tolerance=tolerance)
    q[1, 0], k[17, 1], k[18, 2] = torch.nan, torch.inf, -torch.inf
    compare("similarity_logsumexp", q, k, None, 1.0, *NOTHING, (1.0,), True, True, None)
    compare("similarity_row_attention", q, k, None, 1.0, *NOTHING)
    compare("self_similarity_logsumexp", k, None, 1.0, *NOTHING[:3], *NOTHING[4:], (1.0,), False, None)


def test_gradients_in_panels(compare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three panels of 16 rows, the last of them not full."""
    small = {"limit": 16 * 35 * 4, "tile": 16}
    monkeypatch.setattr(_gradients, "panels", functools.partial(_panel.panels, **small))
    monkeypatch.setattr(_gradients, "panel_rows", functools.partial(_panel.panel_rows, **small))
    q, k = features(35, 36, 34, torch.float32)
    check_logsumexp(compare, q, k, rules=(1, *NOTHING[1:]), offset=1)
    compare("similarity_row_attention", q, k, None, 3.0, 1, *NOTHING[1:])
    check_self(compare, k, (None, 3.0), period=18)


@pytest.mark.parametrize(("blocks", "d"), [(1, 40), (2, 8)])
def test_logsumexps_in_groups_of_rows(compare: Callable, monkeypatch: pytest.MonkeyPatch, d: int, blocks: int) -> None:
    """Columns' partial results of so many blocks of rows fit the memory; some columns are left out in a whole group."""
    n, m = 101, 37
    monkeypatch.setattr(_lse, "PANEL_BYTES", blocks * 2 * m * 4)
    q, k = features(n, m, d, torch.float32)
    q[3] *= 1e3
    k[5, 0] = torch.nan
    groups = torch.arange(n) // 40, torch.arange(m) % 3
    rules = (None, None, *groups, None, True)
    compare("similarity_logsumexp", q, k, None, 3.0, *rules, (1.0, 0.5), True, False, None)
    monkeypatch.setattr(_lse, "PANEL_BYTES", blocks * 3 * n * 4)
    mask = torch.rand(n) < 0.7
    q[70, 0] = torch.inf
    compare("self_similarity_logsumexp", q, None, 3.0, 0, 50, None, mask, False, (1.0, 0.5), False, None)


def test_partial_results_fit_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    new = torch.empty

    def noted(*sizes: Any, **options: Any) -> Tensor:
        made.append(new(*sizes, **options).nbytes)
        return new(*sizes, **options)

    monkeypatch.setattr(torch, "empty", noted)
    q = new(1 << 20, 512, dtype=torch.bfloat16, device="meta")
    with _launch.record("sm_90") as calls:
        contrastive.similarity_logsumexp(q, q, None, 1.0, *NOTHING, (1.0,), True, False, None)
        contrastive.self_similarity_logsumexp(q, None, 1.0, 0, None, None, None, False, (1.0,), False, None)
    assert max(made) <= (512 << 20) + 4 * len(q)
    assert len(calls) > 100
    with _launch.record("sm_90") as calls:
        contrastive.similarity_logsumexp(q[:65536], q[:65536], None, 1.0, *NOTHING, (1.0,), True, False, None)
    assert len(calls) == 2


@pytest.mark.parametrize("d", [16, 40])
def test_small_weights_survive_float16(d: int) -> None:
    """Weights of 1e-8, as the mean over a large batch has, before a large scale: float16 ends at 6e-8."""
    q, k = features(17, 20, d, torch.float32)
    q, k = (1e-3 * q).half(), k.half()
    rules = (None, 1e3, *NOTHING, (1.0,))
    row, col, *_ = torch.ops.sslkernels.similarity_logsumexp(q, k, *rules, True, False, None)
    grads = 1e-7 * torch.randn_like(row), 1e-7 * torch.randn_like(col), None
    rest = None, row, col, row.new_empty(0), (True, False, False)
    dq, _, _ = contrastive.similarity_logsumexp_backward(*grads, q, k, *rules, *rest)
    wide = (doubled(x) for x in (*grads, q, k, *rules, *rest))
    expected, _, _ = torch.ops.sslkernels.similarity_logsumexp_backward(*wide)
    # dq is about 1e-5, in steps of 6e-8
    torch.testing.assert_close(dq.double(), expected, rtol=0.0, atol=1e-2 * expected.abs().max().item())


def check_self(
    compare: Callable,
    z: Tensor,
    scale: tuple = (None, 3.0),
    period: int | None = None,
    groups: Tensor | None = None,
    key_mask: Tensor | None = None,
    differ: bool = False,
    scales: tuple = (1.0,),
    mask: tuple = (True, True),
) -> None:
    pairs = 0, period, groups, key_mask, differ
    compare("self_similarity_logsumexp", z, *scale, *pairs, scales, True, period)
    lse, positive, *_ = torch.ops.sslkernels.self_similarity_logsumexp(z, *scale, *pairs, scales, False, period)
    grads = torch.randn(lse.shape), None if period is None else torch.randn(positive.shape)
    rest = scales, period, lse, z.new_empty(0), mask
    compare("self_similarity_logsumexp_backward", *grads, z, *scale, *pairs, *rest, tolerance=loosest(z.dtype))


@pytest.mark.parametrize(("n", "d"), [(1, 3), (16, 32), (33, 33), (70, 6)])
def test_self_similarity(compare: Callable, n: int, d: int) -> None:
    check_self(compare, features(n, 1, d, torch.float32)[0])


@pytest.mark.parametrize("d", [8, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_similarity_of_two_views(compare: Callable, dtype: torch.dtype, d: int) -> None:
    z = features(1, 46, d, dtype)[1]
    check_self(compare, z, (torch.tensor(5.0), 1.0), period=23, scales=(1.0, 0.5))


@pytest.mark.parametrize("d", [8, 40])
def test_self_similarity_rules(compare: Callable, d: int) -> None:
    z = features(37, 1, d, torch.float32)[0]
    groups, mask = torch.randint(5, (37,)), torch.rand(37) < 0.6
    check_self(compare, z, groups=groups, differ=True, mask=(True, False))
    check_self(compare, z, groups=groups, key_mask=mask, mask=(False, True))


@pytest.mark.parametrize("dtypes", [*((x,) for x in DTYPES), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (17, 33, 32), (3, 300, 20), (20, 50, 33)])
def test_row_attention(compare: Callable, n: int, m: int, d: int, dtypes: tuple) -> None:
    q, k = features(n, m, d, *dtypes)
    tolerance = loosest(*dtypes)
    compare("similarity_row_attention", q, k, torch.tensor(8.0), 1.0, *NOTHING, tolerance=tolerance)
    key_mask = torch.arange(m) % 40 > 30
    compare("similarity_row_attention", q, k, None, 8.0, 0, 5, None, None, key_mask, False, tolerance=tolerance)
