# SPDX-License-Identifier: Apache-2.0
"""Autocast for features only: scales, biases, log-sum-exps and losses stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.reference._precision import AUTOCAST_DEVICES


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)


def cast_features(*tensors: Tensor, autocast: bool = True) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype of the tensors' device where autocast is on; float64 is left alone, as torch does."""
    if not autocast or not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
