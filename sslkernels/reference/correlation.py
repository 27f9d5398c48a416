# SPDX-License-Identifier: Apache-2.0
"""Correlation of features in plain differentiable PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise, under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.reference._precision import compute_dtype, full_precision


def standardize(x: Tensor, eps: float = 1e-5, *, unbiased: bool = False) -> Tensor:
    """See `sslkernels.ops.standardize`."""
    centered = center(x, compute_dtype(x))
    return (centered / (column_variance(centered, unbiased) + eps).sqrt()).to(x.dtype)


def product_frobenius(a: Tensor, b: Tensor | None = None, *, off_diagonal: bool = False) -> Tensor:
    """See `sslkernels.ops.product_frobenius`."""
    b = a if b is None else b
    dtype = compute_dtype(a, b)
    return product(a.to(dtype), b.to(dtype), off_diagonal).square().sum()


def two_view_correlation(x: Tensor, y: Tensor, lambda_param: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """See `sslkernels.ops.two_view_correlation`."""
    dtype = compute_dtype(x, y)
    a, b = (standardize(view.to(dtype), eps) for view in (x, y))
    diagonal = (a * b).mean(0)
    return (1 - diagonal).square().sum() + lambda_param * (product(a, b, True) / len(x)).square().sum()


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
    """See `sslkernels.ops.two_view_covariance`."""
    dtype = compute_dtype(x, y)
    loss = invariance * (x.to(dtype) - y.to(dtype)).square().mean()
    for view in (x, y):
        centered = center(view, dtype)
        std = (column_variance(centered, True) + eps).sqrt()
        entries = product(centered, centered, True) / (len(x) - 1)
        loss = loss + variance * (gamma - std).relu().mean() + covariance * entries.square().sum() / x.shape[1]
    return loss


def center(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x without the mean of each column; twice, since the mean of a column far from zero is rounded."""
    x = x.to(dtype)
    x = x - x.mean(0)
    return x - x.mean(0)


def column_variance(centered: Tensor, unbiased: bool) -> Tensor:
    """The variance of each column of `centered`."""
    return centered.square().sum(0) / (len(centered) - 1 if unbiased else len(centered))


def product(a: Tensor, b: Tensor, off_diagonal: bool) -> Tensor:
    """a^T b, (D, E), its diagonal set to zero for `off_diagonal`."""
    with full_precision(a):
        c = a.T @ b
    return c.masked_fill(torch.eye(len(c), dtype=torch.bool, device=c.device), 0.0) if off_diagonal else c
