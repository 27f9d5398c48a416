# SPDX-License-Identifier: Apache-2.0
"""Redundancy reduction: norms of products a^T b over the batch, and the losses made of them, in the smaller space.

||a^T b||_F^2 = <a a^T, b b^T>_F: where the batch is smaller than the width, the N x N form costs a fraction of the
D x D form in time and memory. Features may be float32, float64, bfloat16 or float16, mixed and strided; sums are
float32 (float64 if any is float64), and so are the results. On a GPU the products are of 16-bit operands where the
features have 16 bits, and where one column's variance is nearly the whole norm, the batch's form loses digits there.
Nothing is cast under autocast. Gradients are computed with the value, where anyone wants them. Double backward raises.
NaN in gives NaN out.
Definitions in plain PyTorch: `sslkernels.reference.correlation`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops import _correlation as op
from sslkernels.ops._emitted import wants_grad

__all__ = ["product_frobenius", "standardize", "two_view_correlation", "two_view_covariance"]


def standardize(x: Tensor, eps: float = 1e-5, *, unbiased: bool = False) -> Tensor:
    """Columns of mean zero and variance one: batch norm without its affine map and running statistics.

        z_nd = (x_nd - mean_d) / sqrt(var_d + eps)      var_d biased (over N), or unbiased (over N - 1)

    Statistics are taken in two passes, with sums in float64, so a column of mean 1e4 and deviation 1e-2 keeps its
    digits. A single row gives zeros.

    Args:
        x: (N, D), N > 0.
        eps: added to the variance.
        unbiased: divide the variance by N - 1; needs N > 1.

    Returns:
        z, (N, D), dense, in the dtype of x.

    Raises:
        ValueError, TypeError: x of another rank, dtype, or too few rows; eps not positive.

    Example:
        >>> standardize(torch.randn(8, 16)).square().mean(0).allclose(torch.ones(16), atol=1e-3)
        True
    """
    check.features(x=x)
    check.positive("eps", eps)
    _rows("x", x, 2 if unbiased else 1, " for unbiased=True" if unbiased else "")
    return op.standard(x, float(eps), unbiased)[0]


def product_frobenius(a: Tensor, b: Tensor | None = None, *, off_diagonal: bool = False) -> Tensor:
    """Squared Frobenius norm of a^T b, with or without its diagonal.

        c_de  = sum_n a_nd b_ne
        value = sum_de c_de^2            off_diagonal: over d != e

    For N <= D / 2, about, from the two N x N matrices a a^T and b b^T; else from tiles of c. Neither c nor a gradient
    with respect to it is stored whole. Without b (a^T a) only half of the symmetric matrices is computed.

    Args:
        a: (N, D).
        b: (N, E); None: a itself. E = D for off_diagonal.

    Returns:
        scalar, float32 (float64 if an input is); 0 for N = 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above.

    Example:
        >>> z = torch.randn(32, 256, requires_grad=True)
        >>> product_frobenius(z - z.mean(0), off_diagonal=True).backward()
    """
    _features("a", a)
    if b is not None:
        _features("b", b)
        check.same_device("b", b, "a", a)
        if b.shape[0] != a.shape[0]:
            raise ValueError(f"b must have as many rows as a ({a.shape[0]}), got shape {tuple(b.shape)}")
        if off_diagonal and b.shape != a.shape:
            raise ValueError(f"b must have the shape of a {tuple(a.shape)} for off_diagonal, got {tuple(b.shape)}")
    return op.frobenius(a, b, off_diagonal, wants_grad(a, b))[0]


def two_view_correlation(x: Tensor, y: Tensor, lambda_param: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """Cross-correlation of two views against the identity: the whole loss of Barlow Twins.

        c     = standardize(x, eps)^T standardize(y, eps) / N
        value = sum_d (1 - c_dd)^2 + lambda_param * sum_{d != e} c_de^2

    c is not stored where N is at most about D / 2, and in panels beyond. On a CPU the standardised views are not
    either; on a GPU they are.

    Args:
        x, y: the two views, (N, D), N > 0 and D > 0. Gradient to both.
        lambda_param: weight of the off-diagonal terms.
        eps: added to the variances, which are biased.

    Returns:
        scalar, float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; numbers that are not finite; eps not
            positive.

    Example:
        >>> x, y = torch.randn(32, 256, requires_grad=True), torch.randn(32, 256)
        >>> two_view_correlation(x, y).backward()

    Source: Barlow Twins (arXiv:2103.03230), `main.py`; no division by D.
    """
    _views(x, y, 1)
    check.finite("lambda_param", lambda_param)
    check.positive("eps", eps)
    return op.correlation(x, y, float(lambda_param), float(eps), wants_grad(x, y))[0]


def two_view_covariance(
    x: Tensor,
    y: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """Distance of two views, variance and covariance of each: the whole loss of VICReg, as the paper has it.

        cov_x = (x - mean)^T (x - mean) / (N - 1),  std_x = sqrt(diagonal(cov_x) + eps), likewise of y
        value = invariance * mean((x - y)^2)
              + variance   * (mean_d relu(gamma - std_x_d) + mean_d relu(gamma - std_y_d))
              + covariance * (sum_{d != e} cov_x_de^2 + sum_{d != e} cov_y_de^2) / D

    VICReg's code halves the variance terms: `variance=12.5`.

    Args:
        x, y: the two views, (N, D), N > 1 and D > 0. Gradient to both.
        gamma: the deviation below which a column costs.
        eps: added to the variances, which are unbiased.

    Returns:
        scalar, float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; numbers that are not finite; eps not
            positive.

    Example:
        >>> x, y = torch.randn(32, 256, requires_grad=True), torch.randn(32, 256)
        >>> two_view_covariance(x, y).backward()

    Source: VICReg (arXiv:2105.04906), equations 1 to 6; `main_vicreg.py` halves the variance terms.
    """
    _views(x, y, 2)
    numbers = {"invariance": invariance, "variance": variance, "covariance": covariance, "gamma": gamma}
    for name, number in numbers.items():
        check.finite(name, number)
    check.positive("eps", eps)
    weights = (float(invariance), float(variance), float(covariance))
    return op.covariance(x, y, weights, float(gamma), float(eps), wants_grad(x, y))[0]


def _features(name: str, x: Any) -> None:
    check.features(**{name: x})


def _rows(name: str, x: Tensor, least: int, why: str = "") -> None:
    if x.shape[0] < least:
        raise ValueError(f"{name} must have at least {least} row{'s' * (least > 1)}{why}, got shape {tuple(x.shape)}")


def _views(x: Any, y: Any, least: int) -> None:
    check.features(x=x, y=y)
    if y.shape != x.shape:
        raise ValueError(f"y must have the shape of x {tuple(x.shape)}, got {tuple(y.shape)}")
    _rows("x", x, least)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one feature, got shape {tuple(x.shape)}")
