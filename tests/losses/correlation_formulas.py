# SPDX-License-Identifier: Apache-2.0
"""The redundancy-reduction losses as their authors' code and lightly's write them, in the dtype of the inputs.

Nothing here comes from the library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def off_diagonal(c: Tensor) -> Tensor:
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def barlow_twins(z_a: Tensor, z_b: Tensor, lambda_param: float = 5e-3) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = a.T @ b / len(a)
    return (torch.diagonal(c) - 1).pow(2).sum() + lambda_param * off_diagonal(c).pow(2).sum()


def vicreg(
    x: Tensor,
    y: Tensor,
    sim: float = 25.0,
    std: float = 25.0,
    cov: float = 1.0,
    eps: float = 1e-4,
    *,
    halves: float = 2,
) -> Tensor:
    """`halves`: what the variance terms are divided by, 2 in the authors' code, 1 in the paper."""
    loss = sim * F.mse_loss(x, y)
    for z in (x - x.mean(0), y - y.mean(0)):
        loss = loss + std / halves * F.relu(1 - (z.var(0) + eps).sqrt()).mean()
        loss = loss + cov * off_diagonal(z.T @ z / (len(z) - 1)).pow(2).sum() / z.shape[1]
    return loss


def tico(
    z_a: Tensor, z_b: Tensor, c: Tensor, beta: float = 0.9, rho: float = 8.0, *, through_batch: bool = False
) -> tuple[Tensor, Tensor]:
    z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    b = z_a.T @ z_a / len(z_a)
    c = beta * c + (1 - beta) * (b if through_batch else b.detach())
    loss = 1 - (z_a * z_b).sum(1).mean() + rho * (z_a @ c * z_a).sum(1).mean()
    return loss, c.detach()


def frossl(views: list[Tensor], weight: float = 1.0, *, constant_trace: bool = True) -> Tensor:
    """lightly's and solo-learn's; theirs reads the trace into a Python number, which makes it a constant."""
    views = [F.normalize(z, dim=0) for z in views]
    average = torch.stack(views).mean(0)
    loss = views[0].new_zeros(())
    for z in views:
        c = z.T @ z
        trace = torch.trace(c)
        c = c / (trace.detach() if constant_trace else trace)
        loss = loss + 2 * torch.linalg.norm(c).log()
        loss = loss + weight * len(views) * z.shape[1] * F.mse_loss(z, average)
    return loss
