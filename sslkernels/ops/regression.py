# SPDX-License-Identifier: Apache-2.0
"""Regression of hidden targets: layer norm, gather, loss and gradient in one visit of each row that counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops import _regression as op
from sslkernels.reference.regression import default_eps

__all__ = ["average_layers", "masked_regression"]

LOSSES = ("smooth_l1", "l1", "l2", "cosine", "normalized_l2")


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
    """Distance of each predicted row from its target row; gradient to pred only, the target is a constant.

        t[b, m, k] = target[b, ids[b, m, k]], or target's row in pred's place
        t          = (t - mean(t)) / sqrt(var(t) + eps)             with normalize_target: over D, biased, no affine
        d          = pred - t
        row        = mean_D |d|                                     loss="l1"
                     mean_D d^2                                     loss="l2"
                     mean_D (d^2 / (2 beta) if |d| < beta else |d| - beta / 2)      loss="smooth_l1"
                     1 - <u, v>                                     loss="cosine"
                     |u - v|^2 = 2 - 2 <u, v>                       loss="normalized_l2"
                     with u = pred / max(|pred|, eps), v = t / max(|t|, eps)
        result     = scale * (mean, sum or each of the rows)

    So "mean" of the first three is the mean over all elements. Only the rows that ids or mask name are read, and only
    those are normalised; a target row may be named many times.

    Args:
        pred: (B, K, D) or (B, M, K, D) with ids; else (..., D).
        target: (B, L, D) with ids, else of the shape of pred. Any floating dtype, also another than pred's.
        ids: (B, K) or, for M masks of one sample, (B, M, K) int64 in [0, L).
        mask: bool, the shape of pred without D: the rows that count; the others are 0 and have no gradient.
        beta: where smooth L1 turns from square to linear; 0 is L1.
        eps: of the layer norm (default 1e-5), or of the lengths: 1e-8 for "cosine", as torch's cosine_similarity;
            1e-6 for "normalized_l2", as BYOL's 1e-12 below the root.
        scale: a factor that is known now costs nothing; multiplying the loss by it would cost a pass over the gradient.
        reduction: "mean" over the rows that count (NaN if there is none), "sum" of rows, "none": (..., ) one a row.

    Returns:
        float32, float64 if pred or target is; not cast under autocast.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; ids together with mask; normalize_target with
            a loss that normalises itself; an id outside the target on the CPU (compiled: RuntimeError) or under
            `check_values`, which otherwise makes its row NaN.

    Example:
        >>> pred, target = torch.randn(2, 4, 5, 16, requires_grad=True), torch.randn(2, 64, 16)
        >>> masked_regression(pred, target, torch.randint(64, (2, 4, 5)), normalize_target=True).backward()

    Source: I-JEPA `train.py` (smooth_l1, normalize_target); V-JEPA (l1, normalize_target); data2vec 2.0 (l2 with
    scale=D**0.5); SimSiam (cosine, minus 1); BYOL `loss_fn` (normalized_l2).
    """
    check.choice("loss", loss, LOSSES)
    check.choice("reduction", reduction, ("mean", "sum", "none"))
    check.in_range("beta", beta, 0.0, float("inf"))
    check.finite("scale", scale)
    if eps is None:
        eps = default_eps(loss)
    check.positive("eps", eps)
    if normalize_target and loss in ("cosine", "normalized_l2"):
        raise ValueError(f"normalize_target must be False for loss={loss!r}, which normalises to unit length itself")
    check_rows(pred, target, ids, mask)
    target = target.detach() if target.requires_grad else target
    options = (loss, float(beta), normalize_target, float(eps))
    index = ids if mask is None else mask
    if reduction == "none":
        rows = op.rows(pred, target, index, *options)
        return rows if scale == 1.0 else rows * scale
    wanted = pred.requires_grad and torch.is_grad_enabled()
    return op.total(pred, target, index, *options, float(scale), reduction == "mean", wanted)[0]


@torch.no_grad()
def average_layers(
    layers: Sequence[Tensor], *, instance_norm: bool = True, layer_norm: bool = False, eps: float = 1e-5
) -> Tensor:
    """Mean of several layers' features, each normalised over time: the targets of data2vec. No gradient.

        y_k = (x_k - mean_L(x_k)) / sqrt(var_L(x_k) + eps)     with instance_norm: over L for each (b, d), biased
        y   = sum_k y_k / K
        y   = (y - mean_D(y)) / sqrt(var_D(y) + eps)           with layer_norm

    Args:
        layers: K tensors (B, L, D), of any floating dtypes.

    Returns:
        (B, L, D) in float32, float64 if a layer is.

    Raises:
        ValueError, TypeError: no layer; shapes, dtypes or devices that differ from the first's or are none of those;
            L = 1 with instance_norm, which would leave nothing.

    Example:
        >>> average_layers([torch.randn(2, 49, 16) for _ in range(10)], layer_norm=True).shape
        torch.Size([2, 49, 16])

    Source: data2vec 2.0 (arXiv:2212.07525), `data2vec2.py::make_targets`.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("layers must hold at least one tensor, got none")
    for i, x in enumerate(layers):
        check.floating(f"layers[{i}]", x)
        check.same_device(f"layers[{i}]", x, "layers[0]", layers[0])
        if x.ndim != 3 or x.shape != layers[0].shape:
            expected = "(B, L, D)" if x.ndim != 3 else f"{tuple(layers[0].shape)} as layers[0]"
            raise ValueError(f"layers[{i}] must have shape {expected}, got {tuple(x.shape)}")
    if instance_norm and layers[0].shape[1] == 1:
        raise ValueError(f"layers must have more than one row for instance_norm, got {tuple(layers[0].shape)}")
    check.positive("eps", eps)
    return op.average(layers, instance_norm, layer_norm, float(eps))


def check_rows(pred: Any, target: Any, ids: Any, mask: Any) -> None:
    """What `masked_regression` says of its tensors."""
    check.floating("pred", pred)
    check.floating("target", target)
    check.same_device("target", target, "pred", pred)
    if pred.ndim == 0 or pred.shape[-1] == 0:
        raise ValueError(f"pred must have shape (..., D) with D > 0, got {tuple(pred.shape)}")
    if ids is not None:
        if mask is not None:
            raise ValueError("mask must not be given together with ids")
        return _check_ids(pred, target, ids)
    if target.shape != pred.shape:
        raise ValueError(
            f"target must have the shape of pred {tuple(pred.shape)} without ids, got {tuple(target.shape)}"
        )
    if mask is not None:
        check.tensor("mask", mask)
        check.same_device("mask", mask, "pred", pred)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
        if mask.shape != pred.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(pred.shape[:-1])}, got {tuple(mask.shape)}")


def _check_ids(pred: Tensor, target: Tensor, ids: Any) -> None:
    check.tensor("ids", ids)
    check.same_device("ids", ids, "pred", pred)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be torch.int64, got {ids.dtype}")
    if target.ndim != 3 or target.shape[-1] != pred.shape[-1]:
        raise ValueError(f"target must have shape (B, L, {pred.shape[-1]}) with ids, got {tuple(target.shape)}")
    if ids.ndim not in (2, 3) or ids.shape[0] != target.shape[0]:
        raise ValueError(
            f"ids must have shape ({target.shape[0]}, K) or ({target.shape[0]}, M, K), got {tuple(ids.shape)}"
        )
    if pred.shape[:-1] != ids.shape:
        raise ValueError(f"pred must have shape {(*ids.shape, target.shape[-1])}, as ids, got {tuple(pred.shape)}")
    check.ids("ids", ids, target.shape[1])
