# SPDX-License-Identifier: Apache-2.0
"""Autocast for features only: scales, biases, log-sum-exps and losses stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

# asked once: dynamo of torch 2.11 cannot trace the question, and a device without autocast cannot be asked further
_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(d))


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return x.device.type in _DEVICES and torch.is_autocast_enabled(x.device.type)


def cast_features(*tensors: Tensor, autocast: bool = True) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype of the tensors' device where autocast is on; float64 is left alone, as torch does."""
    if not autocast or not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
