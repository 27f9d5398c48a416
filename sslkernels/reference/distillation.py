# SPDX-License-Identifier: Apache-2.0
"""Self-distillation in plain differentiable PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.reference._distillation_linear import linear_soft_cross_entropy
from sslkernels.reference._distillation_sinkhorn import sinkhorn_center, sinkhorn_knopp, sinkhorn_sweep
from sslkernels.reference._distillation_soft import (
    centers,
    pairs,
    row_losses,
    row_weights,
    split_views,
    targets,
    teacher_mean,
)
from sslkernels.reference._precision import compute_dtype

__all__ = [
    "linear_soft_cross_entropy",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "sinkhorn_sweep",
    "soft_cross_entropy",
    "softmax_center",
]


def soft_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    center: Tensor | None = None,
    *,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    exclude_same_view: bool = True,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    return_center: bool = False,
) -> Any:
    """See `sslkernels.ops.soft_cross_entropy`."""
    rows_only = isinstance(student, Tensor) and student.ndim == 2
    exclude = exclude_same_view and not rows_only
    s, t = (split_views([x] if isinstance(x, Tensor) else x) for x in (student, teacher))
    dtype = compute_dtype(*s, *t)
    t = [x.detach() for x in t]
    weights = row_weights(row_weight, s[0], dtype)
    constants = targets([x.to(dtype) for x in t], centers(center, dtype), teacher_temp, len(s), exclude)
    rows = torch.stack([row_losses(x.to(dtype), *p, student_temp, weights) for x, p in zip(s, constants)])  # (S, B)
    if reduction != "none":
        total = rows.sum()
        rows = total / (pairs(len(s), len(t), exclude) * weights.sum()) if reduction == "mean" else total
    elif rows_only:
        rows = rows[0]
    return (rows, teacher_mean(t, dtype)) if return_center else rows


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor | None = None, temperature: float = 0.04) -> tuple[Tensor, Tensor]:
    """See `sslkernels.ops.softmax_center`."""
    x = logits.to(compute_dtype(logits))
    shifted = x if center is None else x - center.reshape(-1).to(x.dtype)
    return torch.softmax(shifted / temperature, -1), x.reshape(-1, x.shape[-1]).mean(0)
