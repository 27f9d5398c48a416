# SPDX-License-Identifier: Apache-2.0
"""A small iBOT or DINOv2 in float64, whose loss a test can write out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.nn import VisionTransformer

HEAD = {"hidden_dim": 12, "bottleneck_dim": 6}
OUT = 17


def new_method(kind: Any, **options: Any) -> Any:
    """Of this class, with a teacher and centers of its own."""
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=16, depth=1, num_heads=2)
    method = kind(backbone, **{"out_dim": OUT, "head_options": HEAD, "momentum": 0.9, "total_steps": 10, **options})
    method.double()
    with torch.no_grad():
        for p in (*method.parameters(), *centers(method)):
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    return method


def centers(method: Any) -> tuple[Tensor, Tensor]:
    """Of class tokens and of patches, each (OUT,)."""
    return method.criterion.center[0, 0], method.patch_criterion.center.center[0]
