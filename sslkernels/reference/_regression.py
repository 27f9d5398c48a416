# SPDX-License-Identifier: Apache-2.0
"""The regression ops as the dispatcher calls them where no compiled kernel serves, in plain PyTorch.

Signatures are the schemas'; `index` is int64 ids, a bool mask or None. Gradients are written out, because autograd does
not record below the dispatcher.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.reference.regression import average_layers, operands, row_values, unit


def _split(index):
    """ids, mask"""
    return (None, index) if index is not None and index.dtype == torch.bool else (index, None)


def _row_slopes(p: Tensor, t: Tensor, loss: str, beta: float, eps: float) -> Tensor:
    """d(value of a row)/d(its p)."""
    width = p.shape[-1]
    d = p - t
    if loss == "l2":
        return d * (2 / width)
    if loss == "l1" or (loss == "smooth_l1" and beta == 0):
        return d.sign().where(d == d, d) / width
    if loss == "smooth_l1":
        return (d / beta).clamp(-1.0, 1.0) / width
    (u, short_u), (v, short_v) = unit(p, eps), unit(t, eps)
    norm = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
    away, clamped = u - v, norm < eps
    value = 0.5 * (away.square().sum(-1) + short_u + short_v)
    twice = loss == "normalized_l2"
    outward = torch.where(clamped, away if twice else -v, away - value[..., None] * u)
    return (2 if twice else 1) * outward / norm.clamp_min(eps)


def rows_forward(pred, target, index, loss, beta, normalize_target, eps):
    ids, mask = _split(index)
    rows = row_values(*operands(pred, target, ids, normalize_target, eps), loss, beta, eps)
    return rows if mask is None else rows.masked_fill(~mask, 0.0)


def rows_backward(grad, pred, target, index, loss, beta, normalize_target, eps):
    ids, mask = _split(index)
    slopes = _row_slopes(*operands(pred, target, ids, normalize_target, eps), loss, beta, eps)
    out = grad[..., None].to(slopes.dtype) * slopes
    return (out if mask is None else out.masked_fill(~mask[..., None], 0.0)).to(pred.dtype)


def forward(pred, target, index, loss, beta, normalize_target, eps, scale, mean, need_gradient):
    ids, mask = _split(index)
    p, t = operands(pred, target, ids, normalize_target, eps)
    rows = row_values(p, t, loss, beta, eps)
    weight = p.new_full((), scale)
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    if mean:
        weight = weight / (rows.numel() if mask is None else mask.sum())
    dpred = p.new_empty(0)
    if need_gradient:
        dpred = weight * _row_slopes(p, t, loss, beta, eps)
        dpred = dpred if mask is None else dpred.masked_fill(~mask[..., None], 0.0)
    return rows.sum() * weight, dpred


def average_forward(layers, instance_norm, layer_norm, eps):
    return average_layers(layers, instance_norm=instance_norm, layer_norm=layer_norm, eps=eps)
