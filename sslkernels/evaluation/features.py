# SPDX-License-Identifier: Apache-2.0
"""Features of a data set, from a frozen network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract_features(
    module: nn.Module, images: Tensor, *, encode: Callable[[Tensor], Tensor] | None = None, batch_size: int = 512
) -> Tensor:
    """Features (N, dim) of images (N, ...) in evaluation mode; the module's mode is put back afterwards.

    `encode` defaults to `module.encode` where the module is a method, else to the module itself.
    """
    forward: Callable[[Tensor], Tensor] = encode if encode is not None else getattr(module, "encode", module)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        return torch.cat([forward(batch) for batch in images.split(batch_size)])
    finally:
        for part, mode in modes:
            part.training = mode
