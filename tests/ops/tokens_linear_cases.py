# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy written out with all logits: in float64 the truth, else eager."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops

NAMES = ("loss", "dinput", "dweight", "dbias")


class Case(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(None if x is None else x.to(dtype) for x in self[:3]), self.target)  # type: ignore[arg-type]


def random_case(
    rows: int, depth: int, classes: int, dtype: torch.dtype = torch.float32, selected: float = 0.7, bias: bool = True
) -> Case:
    """Some rows are ignored, but for the first."""
    target = torch.randint(classes, (rows,))
    target[1:][torch.rand(max(rows - 1, 0)) > selected] = -100
    layer = torch.randn(rows, depth), torch.randn(classes, depth) / depth**0.5
    return Case(*layer, torch.randn(classes) if bias else None, target).to(dtype)


def sure_case(margin: float, rows: int = 24, depth: int = 64, classes: int = 2003) -> Case:
    """Each row is near its target's row of the layer: the larger the margin, the smaller the loss."""
    weight = F.normalize(torch.randn(classes, depth), dim=1)
    target = torch.randint(classes, (rows,))
    near = F.normalize(weight[target] + 0.01 * torch.randn(rows, depth), dim=1)
    return Case(near, margin * weight, 0.1 * torch.randn(classes), target)


def written_out(
    case: Case,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """torch's own cross-entropy of the selected rows; 16-bit input in float32, as the op computes."""
    rows = case.target != ignore_index
    logits = F.linear(case.input[rows], case.weight, case.bias)
    loss = F.cross_entropy(logits, case.target[rows], reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * logits.logsumexp(1).square()
    if reduction == "none":
        return torch.zeros_like(case.target, dtype=loss.dtype).index_put((rows,), loss)
    return loss.sum() / rows.sum() if reduction == "mean" else loss.sum()


def ours(case: Case, **options: Any) -> Tensor:
    return ops.linear_cross_entropy(case.input, case.weight, case.target, linear_bias=case.bias, **options)


def evaluate(function: Any, case: Case, cotangent: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of input, weight and bias (where there is one)."""
    layer = [
        None if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in case[:3]
    ]
    loss = function(Case(*layer, case.target), **options)  # type: ignore[arg-type]
    leaves = [x for x in layer if x is not None]
    grads = torch.autograd.grad(loss, leaves, None if cotangent is None else cotangent.to(loss.dtype))
    return [loss.detach(), *grads]


def sums_of_terms(case: Case, grad: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> list[Tensor]:
    """What the gradients would be if no term were negative; `grad` is that of each row."""
    rows = case.target != -100
    logits = F.linear(case.input[rows], case.weight, case.bias)
    slopes = logits.softmax(1) * (1 + 2 * z_loss * logits.logsumexp(1).abs())[:, None]
    slopes = slopes + F.one_hot(case.target[rows], case.weight.shape[0]) + label_smoothing / case.weight.shape[0]
    slopes = slopes * grad[rows].abs()[:, None]
    return [slopes @ case.weight.abs(), slopes.T @ case.input[rows].abs(), slopes.sum(0)]


def check(case: Case, **options: Any) -> None:
    """Never more than twice eager's error in the same precision, plus roundings.

    BLAS adds the terms of a logit in another order than eager's, so it is off by a rounding of their sum, which passes
    into the loss and into every probability. The terms of a gradient may cancel, and BLAS may add n of them one by one,
    whose roundings walk as sqrt(n) does. A gradient is rounded once more to the dtype of what it belongs to.
    """
    wide, count = case.to(torch.float64), int((case.target != -100).sum())
    reduction = options.get("reduction", "mean")
    cotangent = torch.randn(case.target.shape, dtype=torch.float64) if reduction == "none" else None
    dtype = torch.float64 if torch.float64 in [x.dtype for x in case[:3] if x is not None] else torch.float32
    eps = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
    exact = evaluate(written_out, wide, cotangent, **options)
    eager = evaluate(written_out, case.to(dtype), cotangent, **options)
    results = evaluate(ours, case, cotangent, **options)
    share = 1 / max(count, 1) if reduction == "mean" else 1.0
    grad = torch.full(case.target.shape, share, dtype=torch.float64) if cotangent is None else cotangent
    extra = {k: v for k, v in options.items() if k in ("label_smoothing", "z_loss")}
    terms = sums_of_terms(wide, grad, **extra)
    size = F.linear(wide.input.abs(), wide.weight.abs(), None if wide.bias is None else wide.bias.abs()).max()
    steep = 4 * float(size) * (1 + 2 * options.get("z_loss", 0.0) * float(size))
    walks = [(16 + n) ** 0.5 for n in (case.weight.shape[0], count, count)]
    norms = [share * count * steep if cotangent is None else count**0.5 * steep]
    norms += [(walk + steep) * float(x.norm()) for walk, x in zip(walks, terms)]
    dtypes = [dtype, *(x.dtype for x in case[:3] if x is not None)]
    for name, x, e, g, own, norm in zip(NAMES, results, exact, eager, dtypes, norms):
        assert x.shape == e.shape and x.dtype == own, (name, x.shape, x.dtype)
        rounded = torch.finfo(own).eps * e.norm() if own != dtype else 0.0
        error, allowed = (x.double() - e).norm(), 2 * (g.double() - e).norm() + eps * norm + rounded
        assert error <= allowed, (name, float(error), float(allowed), float(e.norm()))
