# SPDX-License-Identifier: Apache-2.0
"""Launches of the self-distillation kernels: DINO's head and loss, iBOT's rows, Sinkhorn-Knopp on its three ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sslkernels.triton import distillation

TENSOR_CORES: set[str] = {"logit_peak_kernel", "probabilities_kernel", "slopes_kernel"}
# a few registers a thread, for another program a multiprocessor: ptxas's choice, but in slopes_kernel the table's
SPILLS: dict[str, int] = {"peak_kernel": 16, "softmax_kernel": 16, "sweep_kernel": 16, "slopes_kernel": 80}

B, V, D = 64, 65536, 256


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dino(dtype: torch.dtype) -> None:
    if dtype != torch.float16:  # compiles as bfloat16 does
        student, teacher = [_empty(10, B, V, dtype=dtype)], [_empty(2, B, V, dtype=dtype)]
        options = (_empty(1, V), None, 0.1, 0.04, True)
        distillation.soft_cross_entropy(student, teacher, *options, True, [True, True])


def _patches(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        student, teacher = [_empty(1, 1024, V, dtype=dtype)], [_empty(1, 1024, V, dtype=dtype)]
        options = (_empty(1, V), _empty(1024), 0.1, 0.04, False)
        distillation.soft_cross_entropy_rows(student, teacher, *options, False)
        distillation.soft_cross_entropy_(student, teacher, *options, True, [True, False])
        distillation.soft_cross_entropy_rows_backward(_empty(1, 1024), student, teacher, *options, [True])


def _softmax(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        distillation.softmax_center(_empty(1024, V, dtype=dtype), _empty(1, V), 0.04)


def _linear(dtype: torch.dtype) -> None:
    layers = _empty(10, B, D, dtype=dtype), _empty(V, D, dtype=dtype), _empty(2, B, D, dtype=dtype)
    options = (0.1, 0.04, True, True, dtype != torch.float16, 8 << 20, [True, True])
    distillation.linear_soft_cross_entropy(*layers, _empty(V, D, dtype=dtype), _empty(1, V), None, *options)


def _sinkhorn(dtype: torch.dtype) -> None:
    for samples, prototypes in ((65536, 256), (256, 65536), (8192, 65536)):
        if dtype == torch.bfloat16 or (dtype == torch.float32 and samples != 8192):
            distillation.sinkhorn_knopp(_empty(samples, prototypes, dtype=dtype), 3, 0.05)


def _sinkhorn_sweep(dtype: torch.dtype) -> None:
    """Of a rank: of SwAV's prototypes, whose rows are whole, and of DINOv2's, read twice."""
    for samples, prototypes in ((256, 3000), (256, 65536)):
        if dtype == torch.float32:
            distillation.sinkhorn_sweep(_empty(samples, prototypes, dtype=dtype), _empty(prototypes), 0.05)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "soft_cross_entropy": _dino,
    "soft_cross_entropy_rows": _patches,
    "softmax_center": _softmax,
    "linear_soft_cross_entropy": _linear,
    "sinkhorn_knopp": _sinkhorn,
    "sinkhorn_sweep": _sinkhorn_sweep,
}
