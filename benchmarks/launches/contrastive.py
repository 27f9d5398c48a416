# SPDX-License-Identifier: Apache-2.0
"""Launches of the contrastive kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sslkernels.triton import contrastive

TENSOR_CORES: set[str] = set()
SPILLS: dict[str, int] = {}


def _normalize(dtype: torch.dtype) -> None:
    x = torch.empty(512, 384, dtype=dtype, device="meta")
    z, norm = contrastive.l2_normalize([x, x], 1e-12)
    contrastive.l2_normalize_backward(torch.empty_like(z), z, norm, 1e-12)


CASES: dict[str, Callable[[torch.dtype], None]] = {"l2_normalize": _normalize}
