# SPDX-License-Identifier: Apache-2.0
"""Moving-average contenders: every update returns the targets that it overwrote."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Contender
from benchmarks.contenders.contrastive import OURS

Tensors = list[Tensor]


def lightly(targets: Tensors, sources: Tensors, momentum: float) -> Tensors:
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1.0 - momentum)
    return targets


def ijepa(targets: Tensors, sources: Tensors, momentum: float) -> Tensors:
    for k, q in zip(targets, sources):
        k.mul_(momentum).add_((1.0 - momentum) * q)
    return targets


def moco(targets: Tensors, sources: Tensors, momentum: float) -> Tensors:
    """A new tensor for each parameter: the list holds new ones afterwards, as `.data` does."""
    for i, (k, q) in enumerate(zip(targets, sources)):
        targets[i] = k * momentum + q * (1.0 - momentum)
    return targets


def foreach_lerp(targets: Tensors, sources: Tensors, momentum: float) -> Tensors:
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)
    return targets


def ours(targets: Tensors, sources: Tensors, momentum: float) -> Tensors:
    from sslkernels.ops import ema_update_

    ema_update_(targets, sources, momentum)
    return targets


def timm(targets: Tensors, sources: Tensors, momentum: float, chunk: int = 2**22) -> Tensors:
    """About 4M elements at a time: put together in float32, random bits below bfloat16's last, truncated."""
    weight = 1.0 - momentum

    def update(some: Tensors, others: Tensors) -> None:
        x = torch.cat([t.reshape(-1) for t in some]).float()
        x.mul_(1.0 - weight).add_(torch.cat([s.reshape(-1) for s in others]), alpha=weight)
        bits = x.view(torch.int32)
        bits.add_(torch.randint(0, 2**16, bits.shape, dtype=torch.int32))
        bits.bitwise_and_(-(2**16))
        parts = x.split([t.numel() for t in some])
        torch._foreach_copy_(some, [part.view(t.shape) for part, t in zip(parts, some)])

    start = count = 0
    for end, t in enumerate(targets):
        if count and count + t.numel() > chunk:
            update(targets[start:end], sources[start:end])
            start, count = end, 0
        count += t.numel()
    update(targets[start:], sources[start:])
    return targets


def ours_stochastic(targets: Tensors, sources: Tensors, momentum: float) -> Tensors:
    from sslkernels.ops import ema_update_

    ema_update_(targets, sources, momentum, stochastic_rounding=True)
    return targets


FLOAT32 = (
    Contender("sslkernels", ours, OURS),
    Contender("lightly", lightly, "lightly 1.6, models/utils.py, update_momentum"),
    Contender("ijepa", ijepa, "facebookresearch/ijepa, train.py"),
    Contender("moco", moco, "facebookresearch/moco, builder.py"),
    Contender("lean", foreach_lerp, "torch._foreach_lerp_, as timm 1.0.31, utils/model_ema.py, ModelEmaV3 calls it"),
)
STOCHASTIC = (
    Contender("sslkernels", ours_stochastic, OURS),
    Contender("timm", timm, "timm 1.0.31, utils/model_ema.py, ModelEmaV3"),
)
