# SPDX-License-Identifier: Apache-2.0
"""Contenders for the regression of hidden targets: I-JEPA's and data2vec 2.0's sequences, and our algebra."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS


def block_major(inputs: Inputs) -> Inputs:
    """I-JEPA's predictor returns all samples of the first target block, then of the second: (M * B, K, D)."""
    return {
        "pred": inputs["pred"].transpose(0, 1).flatten(0, 1),
        "target": inputs["target"],
        "masks": [ids.contiguous() for ids in inputs["ids"].unbind(1)],
    }


def ijepa(pred: Tensor, target: Tensor, masks: list[Tensor]) -> Tensor:
    with torch.no_grad():
        h = F.layer_norm(target, (target.size(-1),))
        blocks = [torch.gather(h, dim=1, index=ids.unsqueeze(-1).repeat(1, 1, h.size(-1))) for ids in masks]
        h = torch.cat(blocks, dim=0)
        # One context block: their repeat for several is a copy of a copy.
        b = len(target)
        h = torch.cat([torch.cat([h[i * b : (i + 1) * b]], dim=0) for i in range(len(masks))], dim=0)
    return F.smooth_l1_loss(pred, h)


def lean_jepa(pred: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    """Gather first: only the rows that are asked for are normalised."""
    with torch.no_grad():
        sample = torch.arange(len(target))[:, None, None]
        rows = F.layer_norm(target[sample, ids], (target.shape[-1],))
    return F.smooth_l1_loss(pred, rows)


def ours_jepa(pred: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    from sslkernels.ops import masked_regression

    return masked_regression(pred, target, ids, normalize_target=True)


def data2vec_targets(layers: list[Tensor]) -> Tensor:
    """Kept as (B, T, C); instance norm wants (B, C, T)."""
    y = [layer.transpose(1, 2) for layer in layers]
    y = [F.instance_norm(layer.float()) for layer in y]
    y = [layer.transpose(1, 2) for layer in y]
    total = y[0]
    for layer in y[1:]:
        total.add_(layer.float())
    total = total.div_(len(y))
    return F.layer_norm(total, total.shape[-1:])


def lean_targets(layers: list[Tensor]) -> Tensor:
    """Standardised where it lies, channels last in memory; one buffer for the sum."""
    total = torch.zeros_like(layers[0])
    for layer in layers:
        var, mean = torch.var_mean(layer, 1, correction=0, keepdim=True)
        scale = (var + 1e-5).rsqrt_()
        total.addcmul_(layer, scale).sub_(mean * scale)
    return F.layer_norm(total.div_(len(layers)), total.shape[-1:])


def ours_targets(layers: list[Tensor]) -> Tensor:
    from sslkernels.ops import average_layers

    return average_layers(layers, layer_norm=True)


JEPA = (
    Contender("sslkernels", ours_jepa, OURS),
    Contender("ijepa", ijepa, "facebookresearch/ijepa, train.py and masks/utils.py", prepare=block_major),
    Contender("lean", lean_jepa, LEAN),
)
TARGETS = (
    Contender("sslkernels", ours_targets, OURS),
    Contender("data2vec", data2vec_targets, "facebookresearch/fairseq, data2vec2.py, make_targets"),
    Contender("lean", lean_targets, LEAN),
)
