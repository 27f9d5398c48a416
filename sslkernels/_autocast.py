# SPDX-License-Identifier: Apache-2.0
"""Autocast for features only: scales, biases, log-sum-exps and losses stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_features(*tensors: Tensor, autocast: bool = True) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype of the tensors' device where autocast is on; float64 is left alone, as torch does."""
    device = tensors[0].device.type
    if not autocast or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
