# SPDX-License-Identifier: Apache-2.0
"""The moving-average primitives in plain PyTorch: the definition. Any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_momentum(momentum: float) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor | float) -> None:
    """target <- momentum * target + (1 - momentum) * source, pair by pair, in place.

    Arithmetic is float32, float64 where either tensor of a pair is; the result is rounded to the target's dtype. A
    momentum tensor outside [0, 1] raises if it is on the CPU, and leaves finite targets as they are elsewhere.
    """
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu":
        momentum = momentum.item()
    if not isinstance(momentum, Tensor):
        check_momentum(momentum)
    for target, source in zip(targets, sources, strict=True):
        dtype = torch.float64 if torch.float64 in (target.dtype, source.dtype) else torch.float32
        if isinstance(momentum, Tensor):
            m = momentum.reshape(()).to(dtype)
            weight: Tensor | float = torch.where((m >= 0) & (m <= 1), 1 - m, 0.0)
        else:
            weight = 1 - momentum
        target.copy_(torch.lerp(target.to(dtype), source.to(dtype), weight))
