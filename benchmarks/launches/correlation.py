# SPDX-License-Identifier: Apache-2.0
"""Launches of the correlation kernels: both spaces, at widths of 8,192 and 2,048."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sslkernels.triton import correlation

TENSOR_CORES = {"gram_kernel", "gram_gradient_kernel", "feature_kernel"}
SPILLS: dict[str, int] = {"gram_gradient_kernel": 8}  # sm_80, float16: two registers beside 128 of sums


def _views(n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.empty(n, d, dtype=dtype, device="meta") for _ in range(2))  # type: ignore[return-value]


def _correlation(n: int, d: int, dtype: torch.dtype) -> None:
    correlation.two_view_correlation(*_views(n, d, dtype), 5e-3, 1e-5, [True, True])


def _covariance(n: int, d: int, dtype: torch.dtype) -> None:
    correlation.two_view_covariance(*_views(n, d, dtype), (25.0, 25.0, 1.0), 1.0, 1e-4, [True, True])


def _frobenius(n: int, d: int, dtype: torch.dtype) -> None:
    correlation.product_frobenius(_views(n, d, dtype)[0], None, True, [True, False])


def _case(function: Callable, n: int, d: int, narrow: torch.dtype | None = None) -> Callable[[torch.dtype], None]:
    """Of 16-bit dtypes only `narrow`, where the other differs in a conversion alone."""
    return lambda dtype: function(n, d, dtype) if dtype in (narrow, torch.float32) or narrow is None else None


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "two_view_correlation-256-8192": _case(_correlation, 256, 8192, torch.bfloat16),
    "two_view_correlation-2048-8192": _case(_correlation, 2048, 8192),
    "two_view_correlation-2048-2048": _case(_correlation, 2048, 2048, torch.bfloat16),
    "two_view_covariance-2048-8192": _case(_covariance, 2048, 8192, torch.bfloat16),
    "two_view_covariance-2048-2048": _case(_covariance, 2048, 2048, torch.bfloat16),
    "product_frobenius-256-8192": _case(_frobenius, 256, 8192, torch.float16),
}
