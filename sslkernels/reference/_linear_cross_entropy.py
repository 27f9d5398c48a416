# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of the logits of a linear layer with hard targets, in plain differentiable PyTorch.

`linear_cross_entropy` is the definition; the others are what the dispatcher calls where no compiled kernel serves, with
the gradients written out, because autograd does not record below the dispatcher.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.reference._precision import compute_dtype, full_precision
from sslkernels.reference.contrastive import logsumexp

SELECTS = ("cpu",)  # where counting rows synchronises nothing


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """See `sslkernels.ops.linear_cross_entropy`."""
    rows = _Rows(input.reshape(-1, input.shape[-1]), target.reshape(-1), linear_weight.shape[0], ignore_index)
    loss = _row_losses(rows, _logits(rows, linear_weight, linear_bias), label_smoothing, z_loss)
    if reduction == "none":
        return rows.put(loss).reshape(target.shape)
    return loss.sum() / rows.count() if reduction == "mean" else loss.sum()


def forward(input, weight, bias, target, ignore_index, label_smoothing, z_loss, mean, _, mask):
    rows = _Rows(input, target, weight.shape[0], ignore_index)
    x = _logits(rows, weight, bias)
    loss = _row_losses(rows, x, label_smoothing, z_loss).sum()
    share = 1 / rows.count().to(loss.dtype) if mean else torch.ones_like(loss)
    grads = _gradients(rows, x, weight, share.expand(len(rows.x)), label_smoothing, z_loss, mask)
    return (loss / rows.count() if mean else loss), *grads


def rows_forward(input, weight, bias, target, ignore_index, label_smoothing, z_loss):
    rows = _Rows(input, target, weight.shape[0], ignore_index)
    x = _logits(rows, weight, bias)
    stats = [rows.put(y) for y in (x.lse(), torch.zeros_like(x.own), x.doubt())]
    return rows.put(_row_losses(rows, x, label_smoothing, z_loss)), torch.stack(stats)


def rows_backward(grad, input, weight, bias, target, stats, ignore_index, label_smoothing, z_loss, mask):
    rows = _Rows(input, target, weight.shape[0], ignore_index)
    x = _logits(rows, weight, bias)
    grads = _gradients(rows, x, weight, rows.take(grad).to(x.own.dtype), label_smoothing, z_loss, mask)
    return tuple(g.to(y.dtype) if wanted else g for g, y, wanted in zip(grads, (input, weight, bias), mask))


class _Rows:
    """The rows that count. On a CPU the others are left out; elsewhere that would synchronise, and they stay as zeros.

    A target that is no class, which only a device may hold here, makes its row NaN.
    """

    def __init__(self, x: Tensor, target: Tensor, classes: int, ignore_index: int) -> None:
        keep = target != ignore_index
        self.total = len(x)
        self.index = keep.nonzero()[:, 0] if x.device.type in SELECTS else None
        self.keep, target = self.take(keep), self.take(target)
        self.spoilt = self.keep & ((target < 0) | (target >= classes))
        self.x = self.take(x).where(self.keep[:, None], 0.0)
        self.target = target.where(self.keep & ~self.spoilt, 0)

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.index]

    def put(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.new_zeros(self.total, *x.shape[1:]).index_copy(0, self.index, x)

    def count(self) -> Tensor:
        return self.keep.sum()

    def finish(self, x: Tensor) -> Tensor:
        """Zero for a row that does not count, NaN for a spoilt one."""
        shape = (-1,) + (1,) * (x.ndim - 1)
        return x.where(self.keep.view(shape), 0.0).masked_fill(self.spoilt.view(shape), torch.nan)


class _Logits(NamedTuple):
    all: Tensor  # (rows, V)
    own: Tensor  # (rows,): the target's
    others: Tensor  # (rows,): log-sum-exp of the rest

    def lse(self) -> Tensor:
        return torch.logaddexp(self.own, self.others)

    def doubt(self) -> Tensor:
        """The probability of all classes but the target's: small for a trained model, and exact then."""
        return torch.sigmoid(self.others - self.own)


def _logits(rows: _Rows, weight: Tensor, bias: Tensor | None) -> _Logits:
    dtype = compute_dtype(rows.x, weight, *(() if bias is None else (bias,)))
    with full_precision(weight):
        x = F.linear(rows.x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    at = rows.target[:, None]
    own, others = x.gather(1, at)[:, 0], logsumexp(x.scatter(1, at, -torch.inf), 1)
    # as a softmax that subtracts its largest logit
    return _Logits(x, *(y.where(y != torch.inf, torch.nan) for y in (own, others)))


def _row_losses(rows: _Rows, x: _Logits, smoothing: float, z_loss: float) -> Tensor:
    loss = F.softplus(x.others - x.own, threshold=80.0)
    if smoothing:
        loss = loss + smoothing * (x.own[:, None] - x.all).mean(1)
    if z_loss:
        loss = loss + z_loss * x.lse().square()
    return rows.finish(loss)


def _gradients(rows, x, weight, grad, smoothing, z_loss, mask):
    """Of sum_i grad_i loss_i: input, weight, bias; an empty tensor where nobody asked."""
    lse, doubt, classes = x.lse(), x.doubt(), weight.shape[0]
    pull = 2 * z_loss * lse if z_loss else torch.zeros_like(lse)
    slopes = (1 + pull)[:, None] * torch.exp(x.all - lse[:, None]) - smoothing / classes
    # minus the sum of the other slopes, plus what z_loss adds
    at_target = pull - (1 + pull) * doubt + smoothing * (classes - 1) / classes
    slopes = slopes.scatter(1, rows.target[:, None], at_target[:, None])
    slopes = rows.finish(slopes * grad[:, None])
    none = slopes.new_empty(0)
    with full_precision(weight):
        return (
            rows.put(slopes @ weight.to(slopes.dtype)) if mask[0] else none,
            slopes.T @ rows.x.to(slopes.dtype) if mask[1] else none,
            slopes.sum(0) if mask[2] else none,
        )
