# SPDX-License-Identifier: Apache-2.0
"""What the correlation ops refuse: by name, with what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sslkernels import ops

X, Y = torch.randn(4, 6), torch.randn(4, 6)
VIEWS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a list": ([1.0], Y, TypeError, "x must be a torch.Tensor, got list"),
    "integers": (X.long(), Y, TypeError, "x must have a floating dtype, got torch.int64"),
    "one dimension": (X[0], Y, ValueError, "x must be 2-D (rows, features), got shape (6,)"),
    "other rows": (X, Y[:3], ValueError, "y must have the shape of x (4, 6), got (3, 6)"),
    "other width": (X, Y[:, :5], ValueError, "y must have as many features as x (6), got shape (4, 5)"),
    "elsewhere": (X, Y.to("meta"), ValueError, "y must be on the device of x (cpu), got meta"),
    "no features": (X[:, :0], Y[:, :0], ValueError, "x must have at least one feature, got shape (4, 0)"),
}
TWO_VIEWS = (ops.two_view_correlation, ops.two_view_covariance)


@pytest.mark.parametrize("function", TWO_VIEWS)
@pytest.mark.parametrize("case", VIEWS)
def test_views_refused_by_name(case: str, function: Callable) -> None:
    x, y, error, message = VIEWS[case]
    with pytest.raises(error, match=re.escape(message)):
        function(x, y)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no row": (lambda: ops.two_view_correlation(X[:0], Y[:0]), ValueError, "x must have at least 1 row, got shape"),
    "one row": (
        lambda: ops.two_view_covariance(X[:1], Y[:1]),
        ValueError,
        "x must have at least 2 rows, got shape (1, 6)",
    ),
    "lambda NaN": (
        lambda: ops.two_view_correlation(X, Y, float("nan")),
        ValueError,
        "lambda_param must be finite, got nan",
    ),
    "lambda tensor": (
        lambda: ops.two_view_correlation(X, Y, torch.tensor(1.0)),  # type: ignore[arg-type]
        TypeError,
        "lambda_param must be a number, got Tensor",
    ),
    "eps zero": (
        lambda: ops.two_view_correlation(X, Y, eps=0.0),
        ValueError,
        "eps must be positive and finite, got 0.0",
    ),
    "eps tensor": (
        lambda: ops.two_view_covariance(X, Y, eps=torch.tensor(1.0)),  # type: ignore[arg-type]
        TypeError,
        "eps must be a number, got Tensor",
    ),
    "gamma text": (
        lambda: ops.two_view_covariance(X, Y, gamma="1"),  # type: ignore[arg-type]
        TypeError,
        "gamma must be a number, got str",
    ),
    "variance infinite": (
        lambda: ops.two_view_covariance(X, Y, variance=float("inf")),
        ValueError,
        "variance must be finite, got inf",
    ),
    "standardize nothing": (lambda: ops.standardize(X[:0]), ValueError, "x must have at least 1 row, got shape (0, 6)"),
    "standardize one row": (
        lambda: ops.standardize(X[:1], unbiased=True),
        ValueError,
        "x must have at least 2 rows for unbiased=True, got shape (1, 6)",
    ),
    "standardize three dimensions": (lambda: ops.standardize(X[None]), ValueError, "x must be 2-D (rows, features)"),
    "standardize eps": (lambda: ops.standardize(X, -1.0), ValueError, "eps must be positive and finite, got -1.0"),
    "standardize eps tensor": (
        lambda: ops.standardize(X, torch.tensor(1.0)),  # type: ignore[arg-type]
        TypeError,
        "eps must be a number, got Tensor",
    ),
    "a of integers": (
        lambda: ops.product_frobenius(X.int()),
        TypeError,
        "a must have a floating dtype, got torch.int32",
    ),
    "b of other rows": (
        lambda: ops.product_frobenius(X, Y[:3]),
        ValueError,
        "b must have as many rows as a (4), got shape (3, 6)",
    ),
    "b of other width": (
        lambda: ops.product_frobenius(X, Y[:, :5], off_diagonal=True),
        ValueError,
        "b must have the shape of a (4, 6) for off_diagonal, got (4, 5)",
    ),
    "b elsewhere": (
        lambda: ops.product_frobenius(X, Y.to("meta")),
        ValueError,
        "b must be on the device of a (cpu), got meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_fakes_are_checked() -> None:
    x, y = X.to("meta"), Y.to("meta")
    assert ops.two_view_correlation(x, y).shape == () and ops.standardize(x).shape == (4, 6)
    with pytest.raises(ValueError, match="y must have the shape of x"):
        ops.two_view_covariance(x, y[:2])
