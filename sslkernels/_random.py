# SPDX-License-Identifier: Apache-2.0
"""Where randomness enters: one int64 seed a call, on the device that uses it, drawn without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels import _checks as check


def seed_tensor(
    seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device | str | None = None
) -> Tensor:
    """The seed as an int64 tensor () on `device`: `seed` itself, or a draw from `generator`, or from torch's own.

    A generator lives on `device`, or on the CPU (its draw is then copied over, which waits for nothing).
    """
    device = torch.device("cpu") if device is None else torch.device(device)
    if seed is not None and generator is not None:
        raise ValueError("expected one of seed and generator, got both")
    if isinstance(seed, Tensor):
        check.tensor("seed", seed)
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be a number or one int64 element, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device.type != device.type:
            raise ValueError(f"seed must be on {device}, got {seed.device}")
        return seed.reshape(())
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
            raise TypeError(f"seed must be an integer or a tensor, got {type(seed).__name__}")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if generator is None:
        return torch.randint(2**63 - 1, (), device=device)
    if generator.device.type not in (device.type, "cpu"):
        raise ValueError(f"generator must be on {device} or on the CPU, got {generator.device}")
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device).to(device, non_blocking=True)
