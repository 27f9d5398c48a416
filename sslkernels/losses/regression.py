# SPDX-License-Identifier: Apache-2.0
"""Losses that regress a target: negative cosine similarity (SimSiam), BYOL's, and those of masked latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed import Batch
from sslkernels.losses import _means as means
from sslkernels.losses._module import Loss, shown_span
from sslkernels.ops.regression import LOSSES, check_rows, masked_regression

__all__ = [
    "BYOLLoss",
    "MaskedRegressionLoss",
    "NegativeCosineSimilarity",
    "byol_loss",
    "negative_cosine_similarity",
]


@distributed.raises_together
def byol_loss(pred: Tensor, target: Tensor, *, process_group: Any = None) -> Tensor:
    """BYOL's regression of unit vectors; the target is a constant.

        loss_i = |u_i - v_i|^2 = 2 - 2 <u_i, v_i>        u = x rsqrt(max(sum x^2, 1e-12)), v likewise
        loss = mean of the rows

    BYOL's loss is the sum over the two views, byol_loss(p1, z2) + byol_loss(p2, z1), and equals 4 + 4 times SimSiam's.

    Args:
        pred, target: (N, D), or (..., D).
        process_group: as in `distributed.Group`; the mean is then over the rows of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; no row.

    Example:
        >>> p1, z2 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> byol_loss(p1, z2).backward()

    Source: Grill et al. 2020, `byol_experiment.py::loss_fn`.
    """
    _refuse_empty("pred", pred)
    loss = masked_regression(pred, target, loss="normalized_l2")
    return _batch(process_group, "byol_loss", pred=pred, target=target).weigh(loss)


@distributed.raises_together
def negative_cosine_similarity(
    x0: Tensor, x1: Tensor, dim: int = 1, eps: float = 1e-8, *, process_group: Any = None
) -> Tensor:
    """-mean cos(x0, x1) over dimension `dim`, with the gradient of either that requires one.

        loss_i = -<x0_i, x1_i> / (max(|x0_i|, eps) max(|x1_i|, eps))
        loss = mean of the rows

    SimSiam's loss is the mean over the two views, 0.5 (f(p1, z2.detach()) + f(p2, z1.detach())).

    Args:
        x0, x1: tensors of one shape, (N, D) where dim is 1.
        process_group: as in `distributed.Group`; the mean is then over the rows of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; no row.

    Example:
        >>> p1, z2 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> negative_cosine_similarity(p1, z2).backward()

    Source: Chen and He 2020, `simsiam/builder.py`; lightly `NegativeCosineSimilarity`.
    """
    for name, x in (("x0", x0), ("x1", x1)):
        _refuse_empty(name, x)
    if x0.shape != x1.shape:
        raise ValueError(f"x1 must have the shape of x0 {tuple(x0.shape)}, got {tuple(x1.shape)}")
    if not -x0.ndim <= dim < x0.ndim:
        raise ValueError(f"dim must be in [{-x0.ndim}, {x0.ndim}), got {dim}")
    brought = {"x0": x0, "x1": x1, "dim": dim, "eps": eps}
    over_rows = x0.ndim > 1 and dim % x0.ndim == 0
    x0, x1 = x0.movedim(dim, -1), x1.movedim(dim, -1)
    loss = masked_regression(x0, x1, loss="cosine", eps=eps) - 1
    if x1.requires_grad:
        mirrored = masked_regression(x1, x0, loss="cosine", eps=eps)
        loss = loss + (mirrored - mirrored.detach())
    batch = _batch(process_group, "negative_cosine_similarity", **brought)
    if over_rows and not batch.local:
        raise ValueError(f"dim must not be that of the rows, which several ranks share out, got {dim}")
    return batch.weigh(loss)


def _batch(process_group: Any, loss: str, /, **brought: Any) -> Batch:
    """One vector alone, (D,), is one row."""
    if process_group is not None:
        brought = {name: x[None] if isinstance(x, Tensor) and x.ndim == 1 else x for name, x in brought.items()}
    return distributed.batch(process_group, None, loss, **brought)


def _refuse_empty(name: str, x: Any) -> None:
    check.floating(name, x)
    if x.numel() == 0:
        raise ValueError(f"{name} must not be an empty batch, got shape {tuple(x.shape)}")


class BYOLLoss(Loss):
    """`byol_loss` as a module, called with (pred, target), which holds the process_group.

    Source: Grill et al. 2020.

    Example:
        >>> BYOLLoss()(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
    """

    def __init__(self, *, process_group: Any = None) -> None:
        super().__init__()
        self.span = {"process_group": process_group}

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return byol_loss(pred, target, **self.span)


class NegativeCosineSimilarity(nn.Module):
    """`negative_cosine_similarity` as a module, called with (x0, x1) as lightly's.

    Source: Chen and He 2020; lightly `NegativeCosineSimilarity`.

    Example:
        >>> NegativeCosineSimilarity()(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8, *, process_group: Any = None) -> None:
        super().__init__()
        check.positive("eps", eps)
        self.dim, self.eps = dim, eps
        self.span = {"process_group": process_group}

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return negative_cosine_similarity(x0, x1, self.dim, self.eps, **self.span)

    def extra_repr(self) -> str:
        return ", ".join([f"dim={self.dim}, eps={self.eps}", *shown_span(self.span)])


class MaskedRegressionLoss(nn.Module):
    """`sslkernels.ops.masked_regression` as a module, which holds the options and refuses an empty batch.

    I-JEPA          MaskedRegressionLoss("smooth_l1", normalize_target=True)
    V-JEPA          MaskedRegressionLoss("l1", normalize_target=True)
    data2vec 2.0    MaskedRegressionLoss("l2", scale=D**0.5)          sum over D / sqrt(D), mean over masked tokens

    process_group is as in `distributed.Group`; a mean is then over the rows that count on all ranks, any number on
    each, also none.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Source: Assran et al. 2023; Bardes et al. 2024; Baevski et al. 2022.

    Example:
        >>> pred, target = torch.randn(2, 4, 5, 16, requires_grad=True), torch.randn(2, 64, 16)
        >>> MaskedRegressionLoss(normalize_target=True)(pred, target, torch.randint(64, (2, 4, 5))).backward()
    """

    def __init__(
        self,
        loss: str = "smooth_l1",
        *,
        beta: float = 1.0,
        normalize_target: bool = False,
        eps: float | None = None,
        scale: float = 1.0,
        reduction: str = "mean",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check.choice("loss", loss, LOSSES)
        check.choice("reduction", reduction, ("mean", "sum", "none"))
        options = {"loss": loss, "beta": beta, "normalize_target": normalize_target, "eps": eps, "scale": scale}
        self.options: dict[str, Any] = {**options, "reduction": reduction}
        self.span = {"process_group": process_group}

    def forward(self, pred: Tensor, target: Tensor, ids: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        return _masked_regression_loss(pred, target, ids, mask, **self.options, **self.span)

    def extra_repr(self) -> str:
        return ", ".join([*(f"{name}={x!r}" for name, x in self.options.items()), *shown_span(self.span)])


@distributed.raises_together
def _masked_regression_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    *,
    reduction: str,
    process_group: Any,
    **options: Any,
) -> Tensor:
    check.floating("pred", pred)
    if process_group is not None:  # before another rank relies on this one
        check_rows(pred, target, ids, mask)
    batch = means.counted_batch(process_group, "MaskedRegressionLoss", pred=pred, reduction=reduction, **options)

    def loss(reduction: str) -> Tensor:
        return masked_regression(pred, target, ids, mask=mask, reduction=reduction, **options)

    def count() -> Tensor:
        rows = pred.shape[:-1]
        return mask.sum() if mask is not None else torch.full((), rows.numel(), device=pred.device)

    return means.reduce_by(loss, reduction, batch, count)
