# SPDX-License-Identifier: Apache-2.0
"""Batch norm on ranks, for test_batch_norm.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.nn import global_batch_norm

CHANNELS = 3


def norm(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = {
        "plain": nn.BatchNorm2d(CHANNELS),
        "without affine": nn.BatchNorm2d(CHANNELS, affine=False),
        "without averages": nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        "equal averages": nn.BatchNorm2d(CHANNELS, momentum=None),
    }[kind]
    for p in made.parameters():
        nn.init.normal_(p)
    return made.double()


def inputs(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = sum(sizes), CHANNELS, 2, 2
    x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return 5 + x * torch.arange(1, 1 + sum(sizes))[:, None, None, None], grad


def passed(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Two forwards, the second with a backward, and one in evaluation mode."""
    module(x / 2)
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    module.eval()
    found = {"y": y.detach(), "dx": x.grad, "eval": module(x).detach() if module.track_running_stats else y.detach()}
    return found | {n: p.grad for n, p in module.named_parameters()} | dict(module.named_buffers())


def step(group: Any, kind: str, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    import torch.distributed as dist

    module = global_batch_norm(nn.Sequential(norm(kind)), group)[0]
    rank = dist.get_rank(group)
    return passed(module, *(part.split(list(sizes))[rank] for part in inputs(sizes)))
