# SPDX-License-Identifier: Apache-2.0
"""Contenders for Sinkhorn-Knopp's codes and SwAV: what named peers ship, restated, and our algebra in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS


def dinov2_sinkhorn(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    """SwAV's is the same sequence."""
    q = torch.exp(scores.float() / epsilon).t()  # (K, B), a transposed view
    k, b = q.shape
    q /= torch.sum(q)
    for _ in range(iterations):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= k
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= b
    q *= b
    return q.t()


def lightly_sinkhorn(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    q = torch.exp(scores / epsilon).t()
    q /= torch.sum(q)
    b = q.shape[1]
    for _ in range(iterations):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= b
    q *= b
    return q.t()


def lean_sinkhorn(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    """By log-sum-exps, so that nothing overflows."""
    log = scores / epsilon
    for _ in range(iterations - 1):
        log = F.log_softmax(F.log_softmax(log, 0), 1)
    return F.softmax(F.log_softmax(log, 0), 1)


def lean_sinkhorn_exp(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    """Two vectors instead of a matrix that is rewritten; right while no row or column lies 88 epsilon below the
    largest score."""
    q = (scores - scores.max()).div_(epsilon).exp_()
    v = scores.new_ones(len(scores))
    for _ in range(iterations):
        u = 1 / (q.t() @ v)
        v = 1 / (q @ u)
    return q.mul_(u).mul_(v[:, None])


def ours_sinkhorn(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    from sslkernels.ops import sinkhorn_knopp

    return sinkhorn_knopp(scores, iterations, epsilon)


def crops_of(inputs: Inputs) -> Inputs:
    """lightly takes large and small crops apart."""
    views = list(inputs["scores"].chunk(inputs["crops"]))
    others = {name: inputs[name] for name in ("tau", "iterations", "epsilon")}
    return {"large": views[:2], "small": views[2:], **others}


def original_swav(scores: Tensor, crops: int, tau: float, iterations: int, epsilon: float) -> Tensor:
    n = len(scores) // crops
    loss = 0
    for i in range(2):
        with torch.no_grad():
            codes = dinov2_sinkhorn(scores[n * i : n * (i + 1)], iterations, epsilon)[-n:]
        subloss = 0
        for v in range(crops):
            if v != i:
                x = scores[n * v : n * (v + 1)] / tau
                subloss -= torch.mean(torch.sum(codes * F.log_softmax(x, dim=1), dim=1))
        loss += subloss / (crops - 1)
    return loss / 2


def lightly_swav(large: list[Tensor], small: list[Tensor], tau: float, iterations: int, epsilon: float) -> Tensor:
    crops = len(large) + len(small)
    loss = large[0].new_zeros(1)
    for i in range(len(large)):
        codes = lightly_sinkhorn(large[i].detach(), iterations, epsilon)
        subloss = large[i].new_zeros(1)
        for z in [*(large[v] for v in range(len(large)) if v != i), *small]:
            subloss += -torch.mean(torch.sum(codes * F.log_softmax(z / tau, dim=1), dim=1))
        loss += subloss / (crops - 1)
    return (loss / len(large))[0]


def lean_swav(scores: Tensor, crops: int, tau: float, iterations: int, epsilon: float) -> Tensor:
    """The codes of both large crops make one target for each small one."""
    first, second = (lean_sinkhorn_exp(view, iterations, epsilon) for view in scores.detach().chunk(crops)[:2])
    log_p = F.log_softmax(scores / tau, dim=1).chunk(crops)
    both = first + second
    total = sum((t * view).sum() for t, view in zip([second, first, *[both] * (crops - 2)], log_p))
    return -total / (2 * (crops - 1) * len(first))


def ours_swav(large: list[Tensor], small: list[Tensor], tau: float, iterations: int, epsilon: float) -> Tensor:
    from sslkernels.losses import swav_loss

    return swav_loss(large, small, temperature=tau, sinkhorn_iterations=iterations, sinkhorn_epsilon=epsilon)


SINKHORN = (
    Contender("sslkernels", ours_sinkhorn, OURS),
    Contender(
        "dinov2",
        dinov2_sinkhorn,
        "facebookresearch/dinov2, loss/dino_clstoken_loss.py, and facebookresearch/swav, main_swav.py",
    ),
    Contender("lightly", lightly_sinkhorn, "lightly, loss/swav_loss.py, sinkhorn"),
    Contender("lean", lean_sinkhorn, f"{LEAN}, by log-sum-exps"),
    Contender("lean-exp", lean_sinkhorn_exp, f"{LEAN}, by one exponential and products with vectors"),
)
SWAV = (
    Contender("sslkernels", ours_swav, OURS, prepare=crops_of),
    Contender("swav", original_swav, "facebookresearch/swav, main_swav.py, train"),
    Contender("lightly", lightly_swav, "lightly, loss/swav_loss.py, SwaVLoss", prepare=crops_of),
    Contender("lean", lean_swav, LEAN),
)
