# SPDX-License-Identifier: Apache-2.0
"""In what precision the primitives compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*xs: Tensor | torch.dtype) -> torch.dtype:
    """float64 if any tensor or dtype is float64, else float32."""
    dtypes = [x if isinstance(x, torch.dtype) else x.dtype for x in xs]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast on the device of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
