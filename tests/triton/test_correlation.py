# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the correlation ops in the interpreter, against the reference.

Its tiles have 16 or 32 rows and 32 or 64 columns; N <= D / 2 is the N x N form.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslkernels.reference import _correlation as reference
from sslkernels.triton import _correlation_features, _launch, correlation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = [True, True]
# 16-bit gradients come of products whose operands, K or C and the views, were rounded to bfloat16, or a standardised
# view to float16 and its gradient to bfloat16; the interpreter cuts where a GPU rounds, which doubles an error
ROUNDED = 1.6e-2
OPS: dict[str, tuple] = {
    "two_view_correlation": (5e-3, 1e-5),
    "two_view_covariance": ((25.0, 25.0, 1.0), 1.0, 1e-4),
    "product_frobenius": (True,),
}
# one tile with all rows, several; edges of tiles; both sides of N = D / 2
SHAPES = ((5, 1), (3, 6), (16, 32), (32, 64), (33, 66), (33, 65), (20, 16), (17, 3))


def views(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Views that agree somewhat, off zero, with columns of different deviation."""
    shared, deviation = torch.randn(n, d), 0.3 + torch.rand(d)
    x, y = (((shared + torch.randn(n, d)) * deviation + 0.5).to(dtype) for _ in range(2))
    return x, y


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(compare: Callable, name: str, shape: tuple[int, int]) -> None:
    compare(name, *views(*shape), *OPS[name], BOTH, tolerance=2e-5)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtypes", [DTYPES[1:2] * 2, DTYPES[2:] * 2, DTYPES[:2]], ids=str)
@pytest.mark.parametrize("shape", [(33, 68), (20, 24)], ids=str)
def test_dtypes(compare: Callable, name: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    x, y = (v.to(dtype) for v, dtype in zip(views(*shape), dtypes))
    compare(name, x, y, *OPS[name], BOTH, tolerance=ROUNDED)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(20, 48), (20, 24)], ids=str)
def test_strides(compare: Callable, name: str, shape: tuple[int, int]) -> None:
    x, y = views(*shape)
    wide = torch.randn(shape[0], 2 * shape[1])
    wide[:, ::2] = y
    compare(name, x.T.contiguous().T, wide[:, ::2], *OPS[name], BOTH, tolerance=2e-5)
    compare(name, x, y[:1].expand(shape), *OPS[name], BOTH, tolerance=2e-5)


@pytest.mark.parametrize("shapes", [((5, 40), (5, 12)), ((5, 3), (5, 40)), ((20, 40), (20, 12))], ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[:1] * 2, DTYPES[:2]], ids=str)
def test_product_of_two_widths(compare: Callable, shapes: tuple, dtypes: tuple[torch.dtype, ...]) -> None:
    a, b = (torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes))
    compare("product_frobenius", a, b, False, BOTH, tolerance=2e-5)


@pytest.mark.parametrize("off_diagonal", [False, True])
@pytest.mark.parametrize("shape", [(20, 48), (20, 24)], ids=str)
def test_product_with_itself(compare: Callable, shape: tuple[int, int], off_diagonal: bool) -> None:
    x = views(*shape)[0]
    compare("product_frobenius", x, None, off_diagonal, [True, False], tolerance=2e-5)
    compare("product_frobenius", x, x, off_diagonal, BOTH, tolerance=2e-5)


def test_empty(compare: Callable) -> None:
    for a, b in ((torch.ones(0, 3), torch.ones(0, 2)), (torch.ones(4, 0), torch.ones(4, 3)), (torch.ones(0, 3), None)):
        compare("product_frobenius", a, b, False, [True, b is not None])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(17, 40), (17, 20)], ids=str)
@pytest.mark.parametrize("wanted", [[True, False], [False, True], [False, False]], ids=str)
def test_output_mask(compare: Callable, name: str, shape: tuple[int, int], wanted: list[bool]) -> None:
    compare(name, *views(*shape), *OPS[name], wanted, tolerance=2e-5)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(20, 48), (20, 24)], ids=str)
def test_nan_spreads(name: str, shape: tuple[int, int]) -> None:
    x, y = views(*shape)
    x[3, 5] = torch.nan
    value, dx, dy = getattr(correlation, name)(x, y, *OPS[name], BOTH)
    for got, want in zip((value, dx, dy), getattr(reference, name)(x, y, *OPS[name], BOTH)):
        assert got.isnan()[want.isnan()].all()


@pytest.mark.parametrize("shape", [(20, 48), (20, 24)], ids=str)
def test_far_means_and_constant_columns(compare: Callable, shape: tuple[int, int]) -> None:
    """A mean a thousand deviations away; the first rows alone far from the others; a column that says nothing."""
    x, y = views(*shape)
    x[:, 1] = 10 + 0.01 * x[:, 1]
    y[:, 3] = 7.3
    compare("two_view_covariance", x, y, *OPS["two_view_covariance"], BOTH, tolerance=2e-5)
    x[:16, 2] += 1000
    compare("two_view_correlation", x, y, *OPS["two_view_correlation"], BOTH, tolerance=1e-4)


def test_whitened_columns() -> None:
    """In feature space the diagonal is zeroed where it stands: of N = 8 D its difference would be rounding."""
    z, _ = torch.linalg.qr(torch.randn(128, 16, dtype=torch.float64))
    value, *_ = correlation.product_frobenius(z.float(), None, True, [False, False])
    assert value < 1e-12  # 240 squares of roundings of 1; float32 sums of the diagonal are 1e-6 from each other


def test_a_norm_is_never_negative() -> None:
    """One column that is not zero, in Gram space: a difference of equals, which rounding may make negative."""
    for _ in range(6):
        z = torch.zeros(8, 17)
        z[:, 0] = torch.randn(8)
        value = correlation.product_frobenius(z, None, True, [False, False])[0]
        assert 0 <= value <= 1e-6 * z.square().sum() ** 2


@pytest.mark.parametrize("name", OPS)
def test_panels(compare: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of 128 rows of C, the last of them shorter."""
    monkeypatch.setattr(_correlation_features, "STORED", 128)
    monkeypatch.setattr(_correlation_features, "PANEL_BYTES", 128)
    compare(name, *views(70, 135), *OPS[name], BOTH, tolerance=2e-5)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(17, 35), (17, 20)], ids=str)
def test_repeatable(name: str, shape: tuple[int, int]) -> None:
    x, y = views(*shape, torch.bfloat16)
    first, second = (getattr(correlation, name)(x, y, *OPS[name], BOTH) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_matrix_of_the_features() -> None:
    """At Barlow Twins' sizes no memory is D x D: in Gram space none, in feature space a quarter of C."""
    made = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                made.append(out.numel())
            return out

    for n, d in ((256, 8192), (2048, 8192), (4097, 8192)):
        x, y = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for _ in range(2))
        made.clear()
        with _launch.record("sm_90"), Sizes():
            correlation.two_view_correlation(x, y, 5e-3, 1e-5, BOTH)
        assert max(made) <= max(2 * n * d, d * d // 4)


@pytest.mark.parametrize(("n", "launches"), [(256, 5), (2048, 7)])
def test_launches(n: int, launches: int) -> None:
    """Each costs some microseconds of a step that takes tens."""
    x, y = (torch.empty(n, 8192, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with _launch.record("sm_90") as calls:
        correlation.two_view_correlation(x, y, 5e-3, 1e-5, BOTH)
    assert len(calls) == launches
