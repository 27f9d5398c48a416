# SPDX-License-Identifier: Apache-2.0
"""The self-distillation ops on a GPU; signatures are the schemas'."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from sslkernels.triton._distillation_linear import linear_soft_cross_entropy
from sslkernels.triton._distillation_sinkhorn import sinkhorn_center, sinkhorn_knopp, sinkhorn_sweep
from sslkernels.triton._distillation_soft import (
    soft_cross_entropy,
    soft_cross_entropy_,
    soft_cross_entropy_rows,
    soft_cross_entropy_rows_backward,
    softmax_center,
)

__all__ = [
    "linear_soft_cross_entropy",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "sinkhorn_sweep",
    "soft_cross_entropy",
    "soft_cross_entropy_",
    "soft_cross_entropy_rows",
    "soft_cross_entropy_rows_backward",
    "softmax_center",
]
