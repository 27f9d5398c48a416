# SPDX-License-Identifier: Apache-2.0
"""The correlation ops over a batch that several ranks hold: the same arguments, and the `Batch`.

Values are alike on all ranks, so that their mean is the value; gradients are those of the sum of all ranks' values.
Means and variances of columns are of all rows, in two reductions of D float64 numbers; what products are of columns,
and where, is in `_product`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslkernels.distributed import _correlation as op
from sslkernels.distributed._group import Batch
from sslkernels.ops import correlation as ops
from sslkernels.ops._emitted import wants_grad


def product_frobenius(batch: Batch, a: Tensor) -> Tensor:
    """`ops.product_frobenius` of a with itself."""
    if batch.local:
        return ops.product_frobenius(a)
    return batch.shared(op.frobenius(a, None, *_route(batch, a), wants_grad(a, None))[0])


def two_view_correlation(batch: Batch, x: Tensor, y: Tensor, lambda_param: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """`ops.two_view_correlation`."""
    if batch.local:
        return ops.two_view_correlation(x, y, lambda_param, eps)
    options = float(lambda_param), float(eps)
    return batch.shared(op.correlation(x, y, *options, *_route(batch, x), wants_grad(x, y))[0])


def two_view_covariance(
    batch: Batch,
    x: Tensor,
    y: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """`ops.two_view_covariance`."""
    if batch.local:
        weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return ops.two_view_covariance(x, y, **weights, gamma=gamma, eps=eps)
    options = (float(invariance), float(variance), float(covariance)), float(gamma), float(eps)
    return batch.shared(op.covariance(x, y, *options, *_route(batch, x), wants_grad(x, y))[0])


def _route(batch: Batch, x: Tensor) -> tuple[Any, ...]:
    return batch.sizes_of(x), batch.rank, batch.world, batch.strategy, batch.name
