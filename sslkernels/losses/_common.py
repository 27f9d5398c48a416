# SPDX-License-Identifier: Apache-2.0
"""What the contrastive losses share: checks, normalisation, reweighted negatives, reduction, statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.distributed import Batch
from sslkernels.ops.contrastive import l2_normalize

IGNORE = -100  # torch.nn.functional.cross_entropy's


def check_pair(sample_weight: Tensor | None = None, **tensors: Any) -> None:
    """Two (N, D) floating tensors of one shape, N > 0, and one weight per row."""
    check.features(**tensors)
    (first_name, first), (name, x) = tensors.items()
    if x.shape != first.shape:
        raise ValueError(f"{name} must have the shape of {first_name} {tuple(first.shape)}, got {tuple(x.shape)}")
    check.not_empty(first_name, first)
    check_weight(sample_weight, first)


def check_weight(sample_weight: Tensor | None, features: Tensor) -> None:
    if sample_weight is not None:
        check.tensor("sample_weight", sample_weight)
        check.vector("sample_weight", sample_weight, features.shape[0], features, (torch.float32, torch.float64))


def check_labels(
    features: dict[str, Any], labels: Any, classes: tuple[str, Any], bias: Any = None, ignore_index: int = IGNORE
) -> None:
    """features: its name and (..., D), perhaps empty; labels: (...) of its shape; classes: their name and (V, D)."""
    ((name, x),) = features.items()
    check.floating(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must be (..., D), got shape {tuple(x.shape)}")
    classes_name, weight = classes
    check.features(**{classes_name: weight})
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{classes_name} must have as many features as {name} ({x.shape[-1]}), got shape {tuple(weight.shape)}"
        )
    check.same_device(classes_name, weight, name, x)
    check.tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(x.shape[:-1])}, got {tuple(labels.shape)}")
    check.same_device("labels", labels, name, x)
    if bias is not None:
        check.vector("bias", bias, weight.shape[0], x, check.FLOATS)
    check.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    check.ids("labels", labels, weight.shape[0], ignore=ignore_index)


def check_sequences(**tensors: Any) -> None:
    """Two floating tensors (B, T, D) of one batch and length, neither of them zero; D may differ."""
    (first_name, first), (name, x) = tensors.items()
    for key, value in tensors.items():
        check.floating(key, value)
        if value.ndim != 3:
            raise ValueError(f"{key} must be (B, T, D), got shape {tuple(value.shape)}")
    check.same_device(name, x, first_name, first)
    if x.shape[:2] != first.shape[:2]:
        raise ValueError(f"{name} must have as many frames as {first_name} {tuple(first.shape)}, got {tuple(x.shape)}")
    if 0 in first.shape[:2]:
        raise ValueError(f"{first_name} must not be an empty batch, got shape {tuple(first.shape)}")


def check_options(
    reduction: str = "mean", label_smoothing: float = 0.0, beta: float = 0.0, tau_plus: float = 0.0
) -> None:
    check.choice("reduction", reduction, ("mean", "sum", "none"))
    check.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check.in_range("beta", beta, 0.0, math.inf)
    check.in_range("tau_plus", tau_plus, 0.0, 1.0)
    if label_smoothing and (beta or tau_plus):
        raise ValueError(
            "label_smoothing is not defined with reweighted negatives, got "
            f"label_smoothing {label_smoothing}, beta {beta}, tau_plus {tau_plus}"
        )


def inverse(temperature: Tensor | float, like: Tensor) -> Tensor | float:
    """1 / temperature, a number for a number and a 0-D tensor for a tensor."""
    check.number("temperature", temperature, like)
    if isinstance(temperature, Tensor):
        return temperature.reshape(()).reciprocal()
    check.positive("temperature", temperature)
    return 1.0 / temperature


def scalar(name: str, x: Tensor | float, like: Tensor) -> Tensor | float:
    """A number, or a tensor of one element as a 0-D one, which does not widen what it multiplies."""
    check.number(name, x, like)
    return x.reshape(()) if isinstance(x, Tensor) else float(x)


def normalize(x: Tensor) -> Tensor:
    """Unit rows of (..., D)."""
    return l2_normalize(x.flatten(0, -2)).view(x.shape)


def one_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> in float32, or float64 if either is."""
    return (wide(a) * wide(b)).sum(-1)


def softplus(x: Tensor) -> Tensor:
    # torch's default threshold of 20 is an error of 1e-10 in float64
    return F.softplus(x, threshold=80.0)


def negatives(
    lse: Tensor, positive: Tensor, count: Tensor | int, scale: Tensor | float, beta: float, tau_plus: float
) -> Tensor:
    """Log of the negatives' weight in the denominator, log(count * g), from their log-sum-exps at scales 1+beta, beta.

        g = sum_j e^{(1+beta) s_j} / sum_j e^{beta s_j}                       negatives weighted by e^{beta s}
        g = max((g - tau_plus e^{positive}) / (1 - tau_plus), e^{-scale})     without the false ones among them

    Source: Robinson et al. 2021, eq. 4 and their `main.py::criterion`; Chuang et al. 2020, eq. 7 and 8.
    """
    if not (beta or tau_plus):
        return lse
    log_count = count.log() if isinstance(count, Tensor) else math.log(count)
    log_g = lse[0] - lse[1] if beta else lse - log_count
    if tau_plus:
        share = math.log(tau_plus) + positive - log_g  # log of the part of g to take away
        legal = share < 0
        rest = log_g + torch.log1p(-torch.exp(share.where(legal, share.new_tensor(-1.0)))) - math.log1p(-tau_plus)
        floor = -scale * torch.ones_like(rest)
        log_g = torch.where(legal & (rest > floor), rest, floor)
    return log_g + log_count


def reduce(rows: Tensor, reduction: str, weight: Tensor | None, batch: Batch) -> Tensor:
    """rows: (N,) or (views, N), where both views of a sample have its weight (N,).

    mean: sum of weighted rows / sum of their weights, as torch's cross_entropy does; sum: without the division;
    none: the weighted rows. Over several ranks the mean and the sum are of the rows of all, in that the mean over the
    ranks of what they return is; none is the own rows.
    """
    if reduction == "none":
        return (rows if weight is None else rows * weight.to(rows.dtype)).flatten()
    if reduction == "mean" and weight is None and batch.local:
        return rows.mean()
    scale = row_weight(rows, reduction, weight, batch)
    return (rows * scale).sum() if weight is not None else rows.sum() * scale


def row_weight(rows: Tensor, reduction: str, weight: Tensor | None, batch: Batch) -> Tensor | float:
    """The w_i, (N,) or one number, for which sum_i w_i rows_i = reduce(rows, reduction, weight, batch)."""
    if weight is None:
        views = rows.numel() // batch.rows
        return batch.world / (views * batch.total(rows)) if reduction == "mean" else batch.world
    weight = weight.to(rows.dtype)
    if reduction == "sum":
        return weight * batch.world
    views = rows.numel() // weight.numel()
    return weight * (batch.world / (views * batch.sum(weight.sum())))


def one_sweep(reduction: str, weight: Tensor | None) -> bool:
    """Whether the row weights are constants that are known in the forward."""
    return reduction != "none" and not (weight is not None and weight.requires_grad)


@torch.no_grad()
def statistics(positive: Tensor, hardest: Tensor) -> dict[str, Tensor]:
    """Share of rows whose positive beats every negative, mean positive logit, mean logit of the hardest negative."""
    return {
        "top1": (positive > hardest).to(hardest.dtype).mean(),
        "positive": positive.mean(),
        "hardest_negative": hardest.mean(),
    }
