# SPDX-License-Identifier: Apache-2.0
"""sinkhorn_knopp and sinkhorn_center against the exponential form of SwAV and DINOv2, written out in float64."""

from __future__ import annotations

import math
import mmap
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import _library, ops
from sslkernels.reference import distillation as reference

F32, F64 = torch.float32, torch.float64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


def exponential(x: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """As the originals have it: prototypes x samples, normalised in turns."""
    q = torch.exp(x / epsilon).T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def logarithmic(x: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """The same on potentials, each from the whole of the other: finite at any temperature."""
    x, g = x / epsilon, x.new_zeros(x.shape[0], 1)
    for _ in range(iterations):
        f = -(x + g).logsumexp(0, keepdim=True)
        g = -(x + f).logsumexp(1, keepdim=True)
    return (x + f + g).exp()


def check(x: Tensor, iterations: int = 3, epsilon: float = 0.05) -> None:
    """Never more than twice the error of eager in the same precision, plus roundings; codes of c are the codes.

    A code is the exp of a difference that is rounded by half an ulp of its score and centre and by one of its own size,
    here and in eager; then it is rounded about four times (exp, sum, quotient, share of the last centre).
    """
    wide = torch.float64 if x.dtype == F64 else F32
    exact = logarithmic(x.double(), iterations, epsilon)
    eager = exponential(x.to(wide), iterations, epsilon)
    if not eager.isfinite().all():
        eager = logarithmic(x.to(wide), iterations, epsilon)
    codes, center = ops.sinkhorn_knopp(x, iterations, epsilon), ops.sinkhorn_center(x, iterations, epsilon)
    assert codes.dtype == center.dtype == wide and codes.shape == x.shape and center.shape == x.shape[1:]
    size = (x.double().abs().max() / epsilon).clamp_min(8)
    bound = 2 * (eager.double() - exact).norm() + torch.finfo(wide).eps * size * exact.norm()
    again = ((x.to(wide) - center) / epsilon).softmax(1)
    for name, got in (("codes", codes), ("of the centre", again)):
        error = (got.double() - exact).norm()
        assert error <= bound, (name, float(error), float(bound))
    assert (codes.double().sum(1) - 1).abs().max() <= 1e-6


# one, primes, a vector of 16, the rows that are visited together, a piece of 1,024 columns, and their neighbours
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 63, 64, 65, 131)
COLUMNS = (1, 2, 3, 15, 16, 17, 31, 33, 67, 257, 1023, 1024, 1025, 2049)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    rows, columns = draw(st.sampled_from(ROWS)), draw(st.sampled_from(COLUMNS))
    torch.manual_seed(draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0, 30.0]))
    x = (torch.randn(rows, columns) * scale).to(draw(st.sampled_from(DTYPES)))
    check(x, draw(st.integers(1, 6)), draw(st.sampled_from([0.02, 0.05, 0.5, 3.0])))


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_values_of_the_exponential_form(iterations: int) -> None:
    """Where it is finite, to float64; three iterations are not converged, so the order of the steps shows."""
    x = F.normalize(torch.randn(96, 32, dtype=F64), dim=1) @ F.normalize(torch.randn(150, 32, dtype=F64), dim=1).T
    expected = exponential(x, iterations)
    torch.testing.assert_close(ops.sinkhorn_knopp(x, iterations), expected, rtol=1e-12, atol=1e-15)
    other_order = logarithmic(x.T, iterations).T
    assert (other_order / other_order.sum(1, keepdim=True) - expected).abs().max() > (1e-3 if iterations <= 3 else 0)


def test_values_by_hand() -> None:
    """E = [[2, 1], [1, 1]]: columns to a half each, then rows: (2/3, 1/2) and (1/3, 1/2) give 4/7 and 2/5."""
    x = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).log() * 0.05
    torch.testing.assert_close(ops.sinkhorn_knopp(x, 1), torch.tensor([[4 / 7, 3 / 7], [2 / 5, 3 / 5]]))
    # once more: columns (34/35, 36/35)
    p = torch.tensor([[4 / 7 / (34 / 35), 3 / 7 / (36 / 35)], [2 / 5 / (34 / 35), 3 / 5 / (36 / 35)]])
    torch.testing.assert_close(ops.sinkhorn_knopp(x, 2), p / p.sum(1, keepdim=True))
    center = ops.sinkhorn_center(x, 1)  # epsilon log(K / B sum of a column)
    torch.testing.assert_close(center, torch.tensor([3.0, 2.0]).log() * 0.05)


def test_converged_codes_use_every_prototype_alike() -> None:
    codes = ops.sinkhorn_knopp(torch.randn(60, 20), 200, 0.3)
    torch.testing.assert_close(codes.sum(0), torch.full((20,), 3.0), rtol=1e-4, atol=0)


def test_a_common_shift_changes_nothing_but_that_of_a_row_does() -> None:
    x = torch.randn(40, 30, dtype=F64)
    codes = ops.sinkhorn_knopp(x)
    torch.testing.assert_close(ops.sinkhorn_knopp(x + 7.0), codes)
    torch.testing.assert_close(
        ops.sinkhorn_knopp(x + torch.randn(30, dtype=F64)), codes
    )  # a prototype's is its centre's
    torch.testing.assert_close(ops.sinkhorn_center(x + 7.0), ops.sinkhorn_center(x) + 7.0)
    assert (ops.sinkhorn_knopp(x - x.amax(1, keepdim=True)) - codes).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("scale", "epsilon"), [(100.0, 0.04), (4.0, 0.001), (1e3, 0.01), (1e4, 0.001), (1e30, 0.05), (1e-30, 0.05)]
)
def test_where_exponentials_leave_their_range(scale: float, epsilon: float, dtype: torch.dtype) -> None:
    for shape in ((33, 70), (70, 33), (5, 1025)):
        x = (scale * torch.randn(shape)).to(dtype)
        check(x, 3, epsilon)
    if scale == 100.0:
        assert exponential(x.float(), 3, epsilon).isnan().any()


@pytest.mark.parametrize("gap", [10.0, 200.0])
def test_prototypes_that_no_sample_likes(gap: float) -> None:
    """Their column of exp(scores / epsilon) is zero in float32 (gap / 0.05 = 4,000), yet they get their share."""
    x = torch.randn(50, 20)
    x[:, 3:8] -= gap
    check(x)
    shifted = x.clone()
    shifted[:, 3:8] += gap
    torch.testing.assert_close(ops.sinkhorn_knopp(x), ops.sinkhorn_knopp(shifted), rtol=0, atol=gap * 1e-5)


@pytest.mark.parametrize("gap", [10.0, 200.0])
def test_samples_that_like_no_prototype(gap: float) -> None:
    """Their weights are below the range of exp at first: the row is done again relative to its own maximum."""
    x = torch.randn(50, 20)
    x[[0, 7, 8, 49]] -= gap
    check(x)
    x[[1, 30]] += gap
    check(x)


def test_hidden_scores_as_the_exponential_form() -> None:
    x = torch.randn(30, 12, dtype=F64)
    x[torch.rand(30, 12) < 0.2] = -math.inf
    for y in (x, x.float()):
        codes = ops.sinkhorn_knopp(y)
        torch.testing.assert_close(codes, exponential(x).to(y.dtype), rtol=1e-12 if y is x else 1e-4, atol=1e-7)
        assert not codes[x == -math.inf].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_what_is_not_finite_spoils_its_view(bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(2, 30, 40).to(dtype)
    x[1, 17, 21] = bad
    codes, center = ops.sinkhorn_knopp(x), ops.sinkhorn_center(x)
    assert exponential(x[1].double()).isnan().all()
    assert codes[1].isnan().all() and center[1].isnan().all()
    assert torch.equal(codes[0], ops.sinkhorn_knopp(x[0])) and codes[0].isfinite().all()


def test_a_nan_of_any_kind_stays_one() -> None:
    """Bits of a NaN must not become a number where an exponent is put together from bits."""
    for pattern in (0x7FC00001, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x3FFFFF, -1):
        x = torch.randn(9, 20)
        x[4, 3] = torch.tensor(pattern, dtype=torch.int32).view(F32)
        assert ops.sinkhorn_knopp(x).isnan().all(), hex(pattern)


def test_a_row_or_column_without_a_score() -> None:
    """Zero over zero in the exponential form: a prototype spoils all, a sample itself and from the second turn all."""
    x = torch.randn(6, 5)
    x[:, 2] = -math.inf
    assert ops.sinkhorn_knopp(x, 1).isnan().all() and exponential(x, 1).isnan().all()
    x = torch.randn(6, 5)
    x[4] = -math.inf
    for iterations in (1, 3):
        codes, expected = ops.sinkhorn_knopp(x, iterations), exponential(x, iterations)
        assert torch.equal(codes.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (1, 3000)])
def test_a_single_sample_or_prototype(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    check(x)
    expected = torch.full(shape, 1 / shape[1])
    torch.testing.assert_close(ops.sinkhorn_knopp(x), expected)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values otherwise in memory."""
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(x.dtype)
    wide[..., ::2] = x
    padded = torch.randn(x.shape[0] + 1, x.shape[1] + 3, x.shape[2] + 5).to(x.dtype)
    padded[1:, 1:-2, 2:-3] = x
    return {
        "every other column": wide[..., ::2],
        "slice": padded[1:, 1:-2, 2:-3],
        "transposed": x.mT.contiguous().mT,
        "views last": x.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1)))
def test_strides(layout: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 13, 1037).to(dtype)
    moved = layouts(x)[layout]
    assert torch.equal(moved, x) and moved.stride() != x.stride()
    for op in (ops.sinkhorn_knopp, ops.sinkhorn_center):
        assert torch.equal(op(moved), op(x))
        assert torch.equal(op(moved[1]), op(x)[1])
    assert torch.equal(ops.sinkhorn_knopp(x[:1].expand(2, -1, -1))[1], ops.sinkhorn_knopp(x[0]))


def test_views_are_on_their_own() -> None:
    x = torch.randn(3, 20, 30)
    codes, center = ops.sinkhorn_knopp(x), ops.sinkhorn_center(x)
    assert center.shape == (3, 30)
    for view, q, c in zip(x, codes, center):
        assert torch.equal(q, ops.sinkhorn_knopp(view)) and torch.equal(c, ops.sinkhorn_center(view))
        check(view)


@pytest.mark.parametrize("shape", [(300, 700), (2, 33000), (33000, 2), (1500, 64)])
def test_threads_and_repeats(threads: int, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    check(x)
    for op in (ops.sinkhorn_knopp, ops.sinkhorn_center):
        assert torch.equal(op(x), op(x))


def test_many_samples_do_not_lose_digits() -> None:
    """A column's sum over 20,000 rows is blocked: its error stays far below that of a running sum."""
    x = 0.05 * torch.randn(20000, 3)
    exact = logarithmic(x.double())
    assert (ops.sinkhorn_knopp(x).double() - exact).abs().max() <= 1e-6


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_instruction_set(dtype: torch.dtype, level: int) -> None:
    for scale in (1.0, 30.0):
        check((scale * torch.randn(37, 1083)).to(dtype))
        check((scale * torch.randn(83, 29)).to(dtype))


@built
@pytest.mark.parametrize(("rows", "columns"), [(64, 20), (96, 150), (256, 1000)])
def test_cosines_within_twice_the_error_of_eager(rows: int, columns: int, level: int) -> None:
    """What SwAV has, where the exponential form is at its best: twice its error and one rounding, nothing more."""
    x = F.normalize(torch.randn(rows, 32), dim=1) @ F.normalize(torch.randn(columns, 32), dim=1).T
    exact = logarithmic(x.double())
    error, eager = ((codes.double() - exact).norm() for codes in (ops.sinkhorn_knopp(x), exponential(x)))
    assert error <= 2 * eager + torch.finfo(F32).eps * exact.norm()


@built
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved only where it is touched")
def test_offsets_beyond_32_bits() -> None:
    step, rows, width = 2**30, 4, 16
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * (step * (rows - 1) + width), flags=flags)
    far = torch.frombuffer(memory, dtype=F32).as_strided((rows, width), (step, 1))
    far.copy_(torch.randn(rows, width))
    assert torch.equal(ops.sinkhorn_knopp(far), ops.sinkhorn_knopp(far.contiguous()))


# one sweep


def iterated(parts: list[Tensor], iterations: int, epsilon: float, *, op: Any = ops.sinkhorn_sweep) -> Tensor:
    """The centre of samples that are in several places."""
    samples, prototypes = sum(x.shape[-2] for x in parts), parts[0].shape[-1]
    center = None
    for _ in range(iterations):
        sums = torch.stack([op(x, center, epsilon) for x in parts])
        added = epsilon * ((sums / epsilon).logsumexp(0) + math.log(prototypes / samples))
        center = added if center is None else center + added
    return center


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 17), (3, 1025), (2, 30, 40)], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sweeps_of_parts_make_the_centre_of_all(shape: tuple[int, ...], iterations: int, dtype: torch.dtype) -> None:
    """Parts that differ, one of them without a sample; in float64 against the exponential form."""
    x = torch.randn(shape).to(dtype)
    parts = [*x.split([1, shape[-2] - 1], -2), x[..., :0, :]]
    wide = F64 if dtype == F64 else F32
    exact = reference.sinkhorn_center(x.double(), iterations, 0.3)
    for op in (ops.sinkhorn_sweep, reference.sinkhorn_sweep):
        center = iterated(parts, iterations, 0.3, op=op)
        assert center.dtype == wide
        assert (center.double() - exact).abs().max() <= (1e-13 if dtype == F64 else 4 * 2.0**-23 * exact.abs().max())
    if dtype == F64 and x.ndim == 2:
        codes = ((x - center) / 0.3).softmax(-1)
        torch.testing.assert_close(codes, exponential(x, iterations, 0.3), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 3), (7, 16), (9, 1024), (65, 33), (2, 13, 1037)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_a_sweep_is_its_formula(shape: tuple[int, ...], scale: float) -> None:
    """Within roundings of the largest exponent; a sum that float32 cannot tell from nothing is small here too."""
    x, center = scale * torch.randn(shape), torch.randn(*shape[:-2], shape[-1])
    for c in (None, center):
        exact = reference.sinkhorn_sweep(x.double(), None if c is None else c.double(), 0.05)
        got = ops.sinkhorn_sweep(x, c, 0.05).double()
        least = 1e-23 * shape[-2]
        told = exact > (-torch.inf if c is None else 0.05 * math.log(least))
        size = x.abs().max() + (0 if c is None else c.abs().max())
        assert (got - exact)[told].abs().max() <= 4 * 2.0**-23 * size + 1e-6 * 0.05
        assert (got[~told] <= 0.05 * math.log(2 * least)).all()


def test_a_sweep_of_what_is_not_finite() -> None:
    x, center = torch.randn(5, 6, 4), torch.randn(5, 4)
    x[0, :, 1], x[1, 2, 1], x[2, 2, 1], x[3, 2, 1] = -torch.inf, torch.nan, torch.inf, -torch.inf
    first = ops.sinkhorn_sweep(x)
    assert first[0, 1] == -torch.inf and first[1:3, 1].isnan().all() and first[3:].isfinite().all()
    later = ops.sinkhorn_sweep(x, center)
    assert later[1:3].isnan().all() and later[3:].isfinite().all() and later[0, [0, 2, 3]].isfinite().all()
    assert (later[0, 1] / 0.05).exp() <= 6e-23
    for c in (None, center):
        assert (ops.sinkhorn_sweep(x[:, :0], c) == -torch.inf).all()


# autograd, the compiler, errors


def test_no_gradient_and_no_cast_under_autocast() -> None:
    x = torch.randn(6, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for op in (ops.sinkhorn_knopp, ops.sinkhorn_center):
            assert not op(x).requires_grad and torch.equal(op(x), op(x.detach()))
            assert op(x.bfloat16()).dtype == F32


@pytest.mark.parametrize("name", ["sinkhorn_knopp", "sinkhorn_center"])
def test_opcheck(name: str) -> None:
    for x in (torch.randn(5, 7), torch.randn(2, 5, 7).bfloat16(), torch.randn(4, 3, dtype=F64)):
        torch.library.opcheck(getattr(torch.ops.sslkernels, name).default, (x, 3, 0.05))


def test_opcheck_of_a_sweep() -> None:
    for x in (torch.randn(5, 7), torch.randn(2, 5, 7).bfloat16(), torch.randn(4, 3, dtype=F64), torch.randn(0, 3)):
        for center in (None, torch.randn(*x.shape[:-2], x.shape[-1], dtype=F64 if x.dtype == F64 else F32)):
            torch.library.opcheck(torch.ops.sslkernels.sinkhorn_sweep.default, (x, center, 0.05))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    torch.compiler.reset()

    def function(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return ops.sinkhorn_knopp(2 * x, 3, epsilon) + 1, ops.sinkhorn_center(2 * x, 2, epsilon)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    several = ((5, 0.05), (6, 0.06), (9, 0.07))  # the second makes both symbolic
    for rows, epsilon in several if backend == "aot_eager" else several[:1]:
        x = torch.randn(rows, 11)
        for got, expected in zip(compiled(x, epsilon), function(x, epsilon)):
            torch.testing.assert_close(got, expected)


def test_exported() -> None:
    class Codes(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.sinkhorn_knopp(x)

    x = torch.randn(5, 7)
    assert torch.equal(torch.export.export(Codes(), (x,)).module()(x), ops.sinkhorn_knopp(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_definition(dtype: torch.dtype) -> None:
    x = torch.randn(2, 30, 20).to(dtype)
    exact = torch.stack([exponential(view.double()) for view in x])
    bound = 1e-13 if dtype == F64 else 4 * torch.finfo(F32).eps * 80
    for codes in (reference.sinkhorn_knopp(x), ops.sinkhorn_knopp(x)):
        assert (codes.double() - exact).abs().max() <= bound
    torch.testing.assert_close(ops.sinkhorn_center(x), reference.sinkhorn_center(x), rtol=0, atol=2e-6)
    for shape in ((5, 3), (2, 5, 3)):
        meta = torch.empty(shape, device="meta", dtype=dtype)
        assert ops.sinkhorn_knopp(meta).shape == shape
        assert ops.sinkhorn_center(meta).shape == (*shape[:-2], 3) and ops.sinkhorn_center(meta).dtype == codes.dtype


X = torch.randn(4, 5)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"scores": [X]}, TypeError, "scores must be a torch.Tensor, got list"),
    "integers": ({"scores": X.long()}, TypeError, "scores must be float32, float64, bfloat16 or float16, got"),
    "one dimension": ({"scores": X[0]}, ValueError, "scores must have shape (B, K) or (T, B, K), got (5,)"),
    "four": ({"scores": X[None, None]}, ValueError, "scores must have shape (B, K) or (T, B, K), got (1, 1, 4, 5)"),
    "no sample": ({"scores": X[:0]}, ValueError, "scores must have samples and prototypes, got shape (0, 5)"),
    "no prototype": ({"scores": X[:, :0]}, ValueError, "scores must have samples and prototypes, got shape (4, 0)"),
    "no view": ({"scores": X[None][:0]}, ValueError, "scores must have samples and prototypes, got shape (0, 4, 5)"),
    "iterations zero": ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
    "iterations a float": ({"iterations": 3.0}, TypeError, "iterations must be an integer, got float"),
    "epsilon zero": ({"epsilon": 0.0}, ValueError, "epsilon must be positive and finite, got 0.0"),
    "epsilon NaN": ({"epsilon": math.nan}, ValueError, "epsilon must be positive and finite, got nan"),
    "epsilon a tensor": ({"epsilon": torch.tensor(0.05)}, TypeError, "epsilon must be a number, got Tensor"),
    "epsilon a string": ({"epsilon": "0.05"}, TypeError, "epsilon must be a number, got str"),
}


@pytest.mark.parametrize("op", [ops.sinkhorn_knopp, ops.sinkhorn_center])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, op: Any) -> None:
    changed, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        op(**{"scores": X, **changed})


REFUSED_SWEEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one dimension": ({"scores": X[0]}, ValueError, "scores must have shape (B, K) or (T, B, K), got (5,)"),
    "no prototype": ({"scores": X[:, :0]}, ValueError, "scores must have prototypes, got shape (4, 0)"),
    "epsilon zero": ({"epsilon": 0.0}, ValueError, "epsilon must be positive and finite, got 0.0"),
    "centre of integers": ({"center": X[0].long()}, TypeError, "center must be float32, float64, bfloat16 or"),
    "centre a view": ({"center": X[:1]}, ValueError, "center must have shape (5,), got (1, 5)"),
    "one centre of two": ({"scores": X[None], "center": X[0]}, ValueError, "center must have shape (1, 5), got (5,)"),
}


@pytest.mark.parametrize("case", REFUSED_SWEEPS)
def test_a_sweep_refuses_by_name(case: str) -> None:
    changed, error, message = REFUSED_SWEEPS[case]
    with pytest.raises(error, match=re.escape(message)):
        ops.sinkhorn_sweep(**{"scores": X, **changed})
