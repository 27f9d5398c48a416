# SPDX-License-Identifier: Apache-2.0
"""Launches of the regression kernels: a JEPA's blocks, masked rows, BYOL's projections and data2vec's layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sslkernels.triton import regression

TENSOR_CORES: set[str] = set()
SPILLS: dict[str, int] = {}


def _jepa(dtype: torch.dtype) -> None:
    pred = torch.empty(64, 4, 44, 768, dtype=dtype, device="meta")
    target = torch.empty(64, 256, 768, dtype=dtype, device="meta")
    ids = torch.empty(64, 4, 44, dtype=torch.int64, device="meta")
    regression.masked_regression(pred, target, ids, "smooth_l1", 1.0, True, 1e-5, 1.0, True, True)


def _masked(dtype: torch.dtype) -> None:
    x = torch.empty(64, 196, 1024, dtype=dtype, device="meta")
    mask = torch.empty(64, 196, dtype=torch.bool, device="meta")
    options = "l2", 1.0, False, 1e-5
    regression.masked_regression(x, x, mask, *options, 1.0, True, True)
    regression.masked_regression_rows(x, x, mask, *options)
    regression.masked_regression_rows_backward(torch.empty(64, 196, device="meta"), x, x, mask, *options)


def _cosine(dtype: torch.dtype) -> None:
    x = torch.empty(4096, 8192, dtype=dtype, device="meta")
    regression.masked_regression(x, x, None, "cosine", 1.0, False, 1e-8, 1.0, True, True)


def _layers(dtype: torch.dtype) -> None:
    layers = [torch.empty(64, 196, 768, dtype=dtype, device="meta")] * 10
    regression.average_layers(layers, True, True, 1e-5)


def _all_but(dtype: torch.dtype, case: Callable[[torch.dtype], None]) -> Callable[[torch.dtype], None]:
    """Where another 16-bit dtype differs in a conversion alone."""
    return lambda given: None if given == dtype else case(given)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "masked_regression-jepa": _jepa,
    "masked_regression-mask": _all_but(torch.float16, _masked),
    "masked_regression-cosine": _all_but(torch.float16, _cosine),
    "average_layers": _all_but(torch.float16, _layers),
}
