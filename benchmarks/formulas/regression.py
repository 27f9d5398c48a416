# SPDX-License-Identifier: Apache-2.0
"""Regression of hidden targets, written out; run in float64 it judges every contender."""

import torch
from torch import Tensor


def standard(x: Tensor, dim: int) -> Tensor:
    centred = x - x.mean(dim, keepdim=True)
    return centred / (centred.square().mean(dim, keepdim=True) + 1e-5).sqrt()


def jepa(pred: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    """Mean over all elements of d^2 / 2 if |d| < 1 else |d| - 1/2; d = pred - normalised target row ids[b, m, k]."""
    rows = torch.stack([standard(t, -1)[i] for t, i in zip(target, ids, strict=True)])  # (B, M, K, D)
    d = (pred - rows).abs()
    return torch.where(d < 1, d.square() / 2, d - 0.5).mean()


def layer_targets(layers: list[Tensor]) -> Tensor:
    """Mean over layers of each standardised over time, for each sample and channel; then over channels."""
    total = torch.zeros_like(layers[0])
    for layer in layers:
        total += standard(layer, 1)
    return standard(total / len(layers), -1)
