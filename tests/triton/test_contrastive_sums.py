# SPDX-License-Identifier: Apache-2.0
"""The contrastive sums' Triton kernels in the interpreter, against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sslkernels import _library
from sslkernels.triton import _launch, _softplus, _two_view
from tests.triton.conftest import REFERENCE, TOLERANCE, launcher, tensors

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SAME = [(dtype, dtype) for dtype in (F32, BF16, F16)]
MIXED = [(BF16, F32), (F16, BF16)]


def features(rows: int, columns: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    """Rows of about unit length; every second element of a larger matrix where strided."""
    x = torch.randn(columns, 2 * rows) if strided else torch.randn(rows, columns)
    return (x / math.sqrt(columns)).to(dtype).T[::2] if strided else (x / math.sqrt(columns)).to(dtype)


# sampled_logsumexp


SHAPES = [(1, 1, 1, 1), (3, 40, 8, 33), (4, 3, 17, 16), (0, 2, 3, 4), (3, 2, 0, 4)]


@pytest.mark.parametrize(
    ("n", "m", "samples", "columns", "dtypes"),
    [((5, 7, 9, 17, dtypes)) for dtypes in SAME + MIXED] + [(*shape, (F32, F32)) for shape in SHAPES],
)
def test_sampled_logsumexp(compare: Callable, n: int, m: int, samples: int, columns: int, dtypes: tuple) -> None:
    q, k = features(n, columns, dtypes[0], strided=True), features(m, columns, dtypes[1])
    indices = torch.randint(m, (samples, n)).T
    mask = torch.rand(n, samples) < 0.7
    mask[:1] = False  # nothing to draw from
    scale = (torch.tensor(3.0), 1.0)
    compare("sampled_logsumexp", q, k, indices, None, None, 7.0)
    compare("sampled_logsumexp", q, k, indices, mask, *scale)
    lse = torch.ops.sslkernels.sampled_logsumexp(q, k, indices, mask, *scale)
    compare("sampled_logsumexp_backward", torch.randn(n), q, k, indices, mask, *scale, lse, [True] * 3)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_sampled_masks(compare: Callable, wanted: tuple) -> None:
    q, k, indices = torch.randn(3, 40), torch.randn(4, 40), torch.randint(4, (3, 5))
    lse = torch.ops.sslkernels.sampled_logsumexp(q, k, indices, None, None, 1.0)
    compare("sampled_logsumexp_backward", torch.randn(3), q, k, indices, None, None, 1.0, lse, list(wanted))


def test_sampled_indices_outside_give_nan_and_read_nothing(compare: Callable) -> None:
    q, k = torch.randn(5, 6), torch.randn(3, 6)
    indices = torch.randint(3, (5, 4))
    indices[1, 2], indices[3, 0] = 3, -1
    indices[4, 1] = 2**62
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[3, 0] = False  # a wrong index counts although nobody asks for its key
    lse = launcher("sampled_logsumexp")(q, k, indices, mask, None, 1.0)
    assert lse.isnan().tolist() == [False, True, False, True, True]
    expected = torch.logsumexp(torch.einsum("nd,ncd->nc", q, k[indices.clamp(0, 2)]), 1)
    torch.testing.assert_close(lse[::2][:2], expected[::2][:2])
    arguments = torch.randn(5), q, k, indices, mask, torch.tensor(1.0), 1.0, lse
    compare("sampled_logsumexp_backward", *arguments, [True] * 3)
    empty = torch.zeros(0, 6)
    assert launcher("sampled_logsumexp")(q, empty, indices, None, None, 1.0).isnan().all()


def test_sampled_extremes(compare: Callable) -> None:
    q, k = torch.randn(4, 8), torch.randn(6, 8)
    indices = torch.randint(6, (4, 11))
    compare("sampled_logsumexp", q * 1e4, k, indices, None, None, 100.0)
    k[2, 1] = torch.nan
    q[3, 0] = torch.inf
    indices[0] = torch.tensor([0, 1, 3] * 4)[:11]
    compare("sampled_logsumexp", q, k, indices, None, torch.tensor(0.5), 1.0)
    lse = torch.ops.sslkernels.sampled_logsumexp(q, k, indices, None, None, 1.0)
    compare("sampled_logsumexp_backward", torch.ones(4), q, k, indices, None, None, 1.0, lse, [True] * 3)


# distractor_counts


@pytest.mark.parametrize(
    ("batch", "length", "count", "seed"),
    [(4, 9, 13, seed) for seed in (0, -1, 2**33 + 5)]
    + [(2, 8, 8, -(2**63)), (3, 1, 5, 1), (0, 4, 2, 1), (2, 0, 3, 1), (1, 17, 1, 1)],
)
def test_distractor_counts(compare: Callable, batch: int, length: int, count: int, seed: int) -> None:
    lengths = torch.tensor([length, length // 2, 1, 0, -3, 2**40])[:batch]
    compare("distractor_counts", torch.tensor([seed]), lengths, length, count)
    counts = launcher("distractor_counts")(torch.tensor([seed]), lengths, length, count)
    assert counts.diagonal(dim1=1, dim2=2).count_nonzero() == 0


# similarity_softplus and its sum

PAIRS = [(None,) * 5 + (False,), (0, None, None, None, None, False), (1, 3, "groups", "groups", "mask", True)]


def rules(pairs: tuple, n: int, m: int) -> tuple:
    """With tensors where the tuple says so."""
    made = {"groups": lambda size: torch.randint(3, (size,)), "mask": lambda size: torch.rand(size) < 0.7}
    sizes = (0, 0, n, m, m, 0)
    return tuple(made[x](size) if isinstance(x, str) else x for x, size in zip(pairs, sizes))


def compare_sum(compare: Callable, name: str, q: Tensor, k: Tensor, *arguments: Any) -> None:
    """What is summed in float32 as float32; weights that a second product reads are rounded to 16-bit operands."""
    compare(name, q, k, *arguments, [False, False, True, True])
    compare(name, q, k, *arguments, [True] * 4, tolerance=TOLERANCE[q.dtype if q.dtype == k.dtype else F32])


@pytest.mark.parametrize(
    ("pairs", "dtypes"), [(PAIRS[2], dtypes) for dtypes in SAME + MIXED] + [(pairs, (F32, F32)) for pairs in PAIRS[:2]]
)
def test_similarity_softplus(compare: Callable, pairs: tuple, dtypes: tuple) -> None:
    n, m, columns = 17, 35, 19
    q, k = features(n, columns, dtypes[0], strided=True), features(m, columns, dtypes[1])
    numbers = (torch.tensor(10.0), 1.0, None, -5.0, *rules(pairs, n, m))
    compare("similarity_softplus", q, k, *numbers)
    compare("similarity_softplus_backward", torch.randn(n), q, k, *numbers, [True] * 4)
    compare_sum(compare, "similarity_softplus_sum", q, k, torch.rand(2 * n)[::2] / n, 1.0, *numbers)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 16), (0, 3), (3, 0), (33, 2)])
def test_similarity_softplus_sizes(compare: Callable, n: int, m: int) -> None:
    q, k = features(n, 16, BF16), features(m, 16, BF16)
    numbers = (None, 7.0, torch.tensor([-1.0]), 1.0, 0, None, None, None, None, False)
    compare("similarity_softplus", q, k, *numbers)
    compare_sum(compare, "similarity_softplus_sum", q, k, None, 0.5, *numbers)


@pytest.mark.parametrize("wanted", [(True, False, False, True), (False, True, True, False), (False,) * 4])
def test_similarity_softplus_masks(compare: Callable, wanted: tuple) -> None:
    q, k = torch.randn(5, 3), torch.randn(7, 3)
    numbers = (torch.tensor(2.0), 1.0, torch.tensor(1.0), 1.0, *PAIRS[1])
    compare("similarity_softplus_sum", q, k, None, 0.25, *numbers, list(wanted))
    compare("similarity_softplus_backward", torch.randn(5), q, k, *numbers, list(wanted))


@pytest.mark.parametrize("bias", [-40.0, -1e3, 1e4])
def test_softplus_of_large_numbers(compare: Callable, bias: float) -> None:
    """A trained SigLIP's negatives are all far out: log(1 + e) has no digits of e left."""
    q, k = torch.randn(3, 4), torch.randn(5, 4)
    numbers = (None, 1.0, None, bias, *PAIRS[0])
    compare("similarity_softplus", q, k, *numbers)
    compare("similarity_softplus_sum", q, k, None, 1.0, *numbers, [True] * 4)


def test_half_precision_keeps_small_softplus(compare: Callable) -> None:
    """Slopes of 1e-7, and weights of 1e-5 on top, are no numbers of fp16."""
    q, k = features(20, 24, F16), features(18, 24, F16)
    numbers = (torch.tensor(3.0), 1.0, None, -14.0, *PAIRS[1])
    for weight, uniform in ((None, 1e-5), (torch.rand(20) * 1e-5, 1.0)):
        compare("similarity_softplus_sum", q, k, weight, uniform, *numbers, [True] * 4, tolerance=2e-3)
    compare("similarity_softplus_backward", torch.randn(20) * 1e3, q, k, *numbers, [True] * 4)


def test_softplus_carries_nan_and_infinity(compare: Callable) -> None:
    q, k = torch.randn(18, 4), torch.randn(17, 4)
    q[3, 1], q[5, 2] = torch.nan, torch.inf
    numbers = (None, 1.0, None, 0.0, *PAIRS[0])
    compare("similarity_softplus", q, k, *numbers)
    compare("similarity_softplus_sum", q, k, None, 1.0, *numbers, [True] * 4)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_gradients_in_several_panels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    q, k = features(50, 20, dtype), features(40, 20, dtype)
    numbers = (None, 5.0, torch.tensor(0.5), 1.0, *PAIRS[1])
    weight = torch.randn(50)
    whole = launcher("similarity_softplus_backward")(weight, q, k, *numbers, [True] * 4)
    monkeypatch.setattr(_softplus, "PANEL_BYTES", 16 * 40 * dtype.itemsize)
    parts = launcher("similarity_softplus_backward")(weight, q, k, *numbers, [True] * 4)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype != F32 else 1e-5, atol=1e-5)


# similarity_cross_entropy


@pytest.mark.parametrize(
    ("pairs", "dtypes", "columns"),
    [(PAIRS[2], dtypes, 19) for dtypes in SAME + MIXED[:1]] + [(pairs, (F32, F32), 35) for pairs in PAIRS[:2]],
)
def test_similarity_cross_entropy(compare: Callable, pairs: tuple, dtypes: tuple, columns: int) -> None:
    """35 columns do not fit the interpreter's registers: those go by a panel."""
    n, m = 17, 35
    q, k = features(n, columns, dtypes[0], strided=True), features(m, columns, dtypes[1])
    losses = torch.randn(2 * n)[::2], torch.rand(2 * n)[::2] / n, 1.0, torch.tensor(10.0), 1.0, *rules(pairs, n, m)
    tolerance = TOLERANCE[dtypes[0] if dtypes[0] == dtypes[1] else F32]
    for decoupled in (False, True):
        # frozen keys, and keys with a gradient
        for wanted in ([True, False, True, True], [True] * 4):
            compare("similarity_cross_entropy", q, k, *losses, decoupled, wanted, tolerance=tolerance)
    compare("similarity_cross_entropy", q, k, *losses, False, [False, False, True, False])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 33), (0, 3), (3, 0)])
def test_similarity_cross_entropy_sizes(compare: Callable, n: int, m: int) -> None:
    q, k = torch.randn(n, 16), torch.randn(m, 16)
    losses = torch.randn(n), None, 0.5, None, 2.0, *PAIRS[1]
    for wanted in ([True, False, False, False], [True] * 4):
        compare("similarity_cross_entropy", q, k, *losses, False, wanted)


@pytest.mark.parametrize(
    "wanted", [(False, True, False, False), (False, False, False, True), (False, True, True, True), (False,) * 4]
)
def test_similarity_cross_entropy_masks(compare: Callable, wanted: tuple) -> None:
    q, k = torch.randn(5, 3), torch.randn(7, 3)
    compare("similarity_cross_entropy", q, k, torch.randn(5), None, 1.0, None, 2.0, *PAIRS[1], False, list(wanted))


def test_similarity_cross_entropy_of_small_losses(compare: Callable) -> None:
    """A trained model's slopes are 1e-6, of which float16 has no digits."""
    q, k = features(20, 24, F16), features(18, 24, F16)
    losses = torch.full((20,), 16.0), None, 1 / 20, None, 3.0, *PAIRS[1]
    for wanted in ([True, False, True, True], [True] * 4):
        compare("similarity_cross_entropy", q, k, *losses, False, wanted, tolerance=TOLERANCE[F16])


# two_view_cross_entropy


def compare_views(compare: Callable, out0: Tensor, out1: Tensor, *arguments: Any) -> None:
    compare("two_view_cross_entropy", out0, out1, *arguments, tolerance=2 * TOLERANCE[out0.dtype])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("n", "columns"), [(1, 4), (8, 16), (19, 21)])
def test_two_view_cross_entropy(compare: Callable, n: int, columns: int, dtype: torch.dtype) -> None:
    out0, out1 = torch.randn(n, columns).to(dtype), torch.randn(columns, 2 * n).to(dtype).T[::2]
    out0[:1] = 0.0  # shorter than eps
    compare_views(compare, out0, out1, None, 0.5 / n, torch.tensor(2.0), 1.0, False, [True] * 3)
    compare_views(compare, out0, out1, torch.rand(4 * n)[::2], 1.0, None, 5.0, True, [True] * 3)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (False, False, True), (False,) * 3])
def test_two_view_masks(compare: Callable, wanted: tuple) -> None:
    out0, out1 = torch.randn(2, 9, 7)
    compare_views(compare, out0, out1, None, 0.1, None, 5.0, False, list(wanted))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("n", "columns"), [(0, 4), (9, 40), (17, 20)])
def test_two_view_of_what_is_not_small(
    compare: Callable, monkeypatch: pytest.MonkeyPatch, n: int, columns: int, dtype: torch.dtype
) -> None:
    """Wider than the table's DEPTH, or more rows than are small, takes the larger sweeps."""
    monkeypatch.setattr(_two_view, "ROWS", 32)
    out0, out1 = torch.randn(2, n, columns).to(dtype)
    for wanted in ([True] * 3, [False, True, False]):
        compare_views(compare, out0, out1, None, 0.1, torch.tensor(3.0), 1.0, False, wanted)


def test_two_views_in_half_precision_keep_small_weights(compare: Callable) -> None:
    """Weights of 1e-6 times probabilities of 0.1 are no normal numbers of fp16."""
    out0, out1 = torch.randn(2, 9, 7).to(F16)
    compare_views(compare, out0, out1, None, 1e-6, None, 5.0, True, [True] * 3)


def test_two_view_carries_nan(compare: Callable) -> None:
    out0, out1 = torch.randn(2, 9, 7)
    out0[3, 2] = torch.nan
    compare_views(compare, out0, out1, None, 0.1, None, 5.0, False, [True] * 3)


# numbers and vectors of another precision than the features


NUMBER, ROWS = torch.tensor([2.0], dtype=torch.float64), torch.linspace(0.1, 1.0, 17, dtype=torch.float64)
WIDE: dict[str, tuple] = {
    "similarity_logsumexp": (NUMBER, 1.0, *PAIRS[1], (1.0,), True, False, 0),
    "similarity_row_attention": (NUMBER, 1.0, *PAIRS[1]),
    "similarity_softplus": (NUMBER, 1.0, NUMBER, 1.0, *PAIRS[1]),
    "similarity_softplus_sum": (ROWS, 1.0, NUMBER, 1.0, NUMBER[0], 1.0, *PAIRS[1], [True] * 4),
    "similarity_cross_entropy": (ROWS, ROWS, 1.0, NUMBER, 1.0, *PAIRS[1], False, [True] * 4),
    "two_view_cross_entropy": (torch.cat([ROWS, ROWS]), 1.0, NUMBER, 1.0, False, [True] * 3),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, which announces itself
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_float64_numbers_beside_narrower_features(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Triton serves them, and what comes out is as wide as what the op says."""
    q, k = features(17, 8, dtype), features(17, 8, dtype)
    monkeypatch.setattr(_library, "runs_triton", lambda device: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = getattr(torch.ops.sslkernels, name)(q, k, *WIDE[name])
    with _launch.record("sm_90") as calls:
        found = _library._launcher(name, "contrastive")(q, k, *WIDE[name])
    assert calls
    assert [(x.shape, x.dtype) for x in tensors(found)] == [(x.shape, x.dtype) for x in tensors(expected)]
    values = launcher(name)(q, k, *WIDE[name])
    exact = getattr(torch.ops.sslkernels, name).default.redispatch(REFERENCE, q.double(), k.double(), *WIDE[name])
    for a, b in zip(tensors(values), tensors(exact), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-2, atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "most"), [("two_view_cross_entropy", 3), ("similarity_softplus_sum", 2), ("similarity_cross_entropy", 4)]
)
def test_a_small_batch_takes_few_launches(name: str, most: int) -> None:
    """A launch costs 5 to 10 microseconds of the host; a small batch is nothing else."""
    q, k = (torch.empty(256, 128, dtype=BF16, device="meta") for _ in range(2))
    rows, scale = torch.empty(256, device="meta"), (torch.empty((), device="meta"), 1.0)
    arguments: dict[str, tuple] = {
        "two_view_cross_entropy": (None, 1 / 512, *scale, False, [True] * 3),
        "similarity_softplus_sum": (None, 1 / 256, *scale, *scale, *PAIRS[1], [True] * 4),
        "similarity_cross_entropy": (rows, None, 1 / 256, *scale, *PAIRS[1], False, [True, False, True, True]),
    }
    with _launch.record("sm_90") as calls:
        launcher(name)(q, k, *arguments[name])
    assert len(calls) <= most, [call.kernel.__name__ for call in calls]
