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


NOTHING = (None, None, None, None, None, False)
DIAGONAL = (0, *NOTHING[1:])


def _features(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _clip(n: int, d: int) -> Callable[[torch.dtype], None]:
    """Rows and columns, the diagonal left out, a learnable scale."""

    def launch(dtype: torch.dtype) -> None:
        q, k, scale = _features(n, d, dtype), _features(n, d, dtype), torch.empty((), device="meta")
        contrastive.similarity_logsumexp(q, k, scale, 1.0, *DIAGONAL, (1.0,), True, False, 0)

    return launch


def _nt_xent(m: int, d: int) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        z = _features(m, d, dtype)
        contrastive.self_similarity_logsumexp(z, None, 10.0, 0, m // 2, None, None, False, (1.0,), False, m // 2)

    return launch


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "l2_normalize": _normalize,
    "clip": _clip(32_768, 512),
    "clip_narrow": _clip(4_096, 128),
    "nt_xent": _nt_xent(16_384, 128),
}
