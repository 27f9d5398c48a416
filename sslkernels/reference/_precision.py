# SPDX-License-Identifier: Apache-2.0
"""In what precision the primitives compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# asked once: dynamo of torch 2.11 cannot trace the question, and a device without autocast cannot be asked further
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(device)
)


def compute_dtype(*xs: Tensor | torch.dtype) -> torch.dtype:
    """float64 if any tensor or dtype is float64, else float32."""
    dtypes = [x if isinstance(x, torch.dtype) else x.dtype for x in xs]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast on the device of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext()
