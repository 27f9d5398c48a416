# SPDX-License-Identifier: Apache-2.0
"""Regression of hidden targets in plain differentiable PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.reference._precision import compute_dtype


def masked_regression(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    loss: str = "smooth_l1",
    beta: float = 1.0,
    normalize_target: bool = False,
    eps: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """See `sslkernels.ops.masked_regression`."""
    eps = default_eps(loss) if eps is None else eps
    rows = row_values(*operands(pred, target, ids, normalize_target, eps), loss, beta, eps) * scale
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / (rows.numel() if mask is None else mask.sum()) if reduction == "mean" else rows.sum()


def default_eps(loss: str) -> float:
    """BYOL's normalisation, SimSiam's cosine, the layer norm of a target."""
    return {"normalized_l2": 1e-6, "cosine": 1e-8}.get(loss, 1e-5)


def operands(
    pred: Tensor, target: Tensor, ids: Tensor | None, normalize_target: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """pred and the target of each of its rows, in the dtype of the arithmetic."""
    dtype = compute_dtype(pred, target)
    wanted = target.detach()
    if ids is not None:
        wanted = gather_rows(wanted, ids)
    wanted = wanted.to(dtype)
    if normalize_target:
        wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=eps)
    return pred.to(dtype), wanted


def gather_rows(target: Tensor, ids: Tensor) -> Tensor:
    """Rows of target (B, L, D) at ids (B, K) or (B, M, K); NaN where an id lies outside."""
    batch, length, width = target.shape
    flat = ids.reshape(batch, -1, 1)
    outside = (flat < 0) | (flat >= length)
    if length == 0:
        target = target.new_zeros(batch, 1, width)
    rows = target.gather(1, flat.masked_fill(outside, 0).expand(-1, -1, width))
    return rows.masked_fill(outside, torch.nan).reshape(*ids.shape, width)


def unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / max(|x|, eps), and by how much the squared length of that falls short of 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    u = x / norm.clamp_min(eps)
    short = 1 - u.square().sum(-1)
    return u, torch.where(norm[..., 0] < eps, short, torch.zeros_like(short))


def row_values(pred: Tensor, target: Tensor, loss: str, beta: float, eps: float) -> Tensor:
    """The loss of each row."""
    if loss == "l1":
        return (pred - target).abs().mean(-1)
    if loss == "l2":
        return (pred - target).square().mean(-1)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(pred, target, reduction="none", beta=beta).mean(-1)
    (u, short_u), (v, short_v) = unit(pred, eps), unit(target, eps)
    distance = (u - v).square().sum(-1)
    # 1 - <u, v> = (|u - v|^2 + 1 - |u|^2 + 1 - |v|^2) / 2: near 0 it does not cancel
    return distance if loss == "normalized_l2" else 0.5 * (distance + short_u + short_v)


def average_layers(
    layers: Sequence[Tensor], *, instance_norm: bool = True, layer_norm: bool = False, eps: float = 1e-5
) -> Tensor:
    """See `sslkernels.ops.average_layers`."""
    mean = torch.zeros_like(layers[0], dtype=compute_dtype(*layers))
    for x in layers:
        x = x.detach().to(mean.dtype)
        if instance_norm and x.numel():
            x = F.instance_norm(x.transpose(1, 2), eps=eps).transpose(1, 2)
        mean = mean + x / len(layers)
    return F.layer_norm(mean, mean.shape[-1:], eps=eps) if layer_norm else mean
