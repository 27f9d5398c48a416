# SPDX-License-Identifier: Apache-2.0
"""masked_regression written out with torch's own functions: in float64 the truth, in the input's precision eager."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops

LOSSES = ("smooth_l1", "l1", "l2", "cosine", "normalized_l2")
COSINES = ("cosine", "normalized_l2")


class Case(NamedTuple):
    pred: Tensor
    target: Tensor
    ids: Tensor | None = None
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        return self._replace(pred=self.pred.detach().to(dtype), target=self.target.detach().to(dtype))


def random_case(
    lead: tuple[int, ...],
    length: int,
    width: int,
    *,
    rows: str = "ids",
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> Case:
    """pred (*lead, width) beside target (B, length, width) for rows="ids", else beside one of its own shape."""
    pred = torch.randn(*lead, width).to(dtypes[0])
    if rows == "ids":
        target = torch.randn(lead[0], length, width).to(dtypes[1])
        return Case(pred, target, ids=torch.randint(length, lead))
    target = torch.randn(*lead, width).to(dtypes[1])
    return Case(pred, target, mask=torch.rand(lead) < 0.6 if rows == "mask" else None)


def written_out(
    case: Case,
    loss: str = "smooth_l1",
    beta: float = 1.0,
    normalize_target: bool = False,
    eps: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """As the originals have it: everything normalised, then gathered, then compared."""
    pred, target, ids, mask = case
    target = target.to(torch.promote_types(target.dtype, pred.dtype))
    pred = pred.to(target.dtype)
    if normalize_target:
        target = F.layer_norm(target, target.shape[-1:], eps=1e-5 if eps is None else eps)
    if ids is not None:
        target = torch.stack([t[i] for t, i in zip(target, ids)]) if len(ids) else target.new_empty(pred.shape)
    if loss == "cosine":
        rows = 1 - F.cosine_similarity(pred, target, dim=-1, eps=1e-8 if eps is None else eps)
    elif loss == "normalized_l2":
        square = 1e-12 if eps is None else eps**2
        u, v = (x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(square)) for x in (pred, target))
        rows = (u - v).square().sum(-1)
    else:
        function = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[loss]
        options = {"beta": beta} if loss == "smooth_l1" else {}
        rows = function(pred, target, reduction="none", **options).mean(-1)
    if mask is not None:
        rows = rows[mask] if reduction != "none" else rows * mask
    return scale * {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()


def evaluate(function: Any, case: Case, cotangent: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient of pred."""
    leaf = case.pred.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(case._replace(pred=leaf), **options)
    cotangent = torch.ones_like(value) if cotangent is None else cotangent.to(value.dtype)
    (grad,) = torch.autograd.grad(value, leaf, cotangent)
    return value.detach(), grad


def ours(case: Case, **options: Any) -> Tensor:
    return ops.masked_regression(case.pred, case.target, case.ids, mask=case.mask, **options)


def check(case: Case, cotangent: Tensor | None = None, **options: Any) -> None:
    """Never more than twice eager's error in the same precision, plus roundings.

    A result is rounded about four times on its way (moments, inverse deviation or length, difference, sum); the
    gradient once more to pred's dtype. Terms of a cosine, or of the division by a length, may cancel.
    """
    exact, exact_grad = evaluate(written_out, case.to(torch.float64), cotangent, **options)
    eager, eager_grad = evaluate(written_out, case, cotangent, **options)
    value, grad = evaluate(ours, case, cotangent, **options)
    double = torch.float64 in (case.pred.dtype, case.target.dtype)
    assert value.dtype == (torch.float64 if double else torch.float32) and value.shape == exact.shape
    assert grad.dtype == case.pred.dtype and grad.shape == case.pred.shape
    # the truth for float64 is itself float64, and rounds its means before they are subtracted
    eps = 1e-12 if double else torch.finfo(value.dtype).eps
    cosine = options.get("loss") in COSINES
    terms = exact.abs() + abs(options.get("scale", 1.0)) * (case.pred.shape[:-1].numel() if cosine else 0)
    assert_close(value, exact, eager, 4 * eps * terms)
    size = exact_grad.norm()
    if cosine:
        weight = 2.0 if cotangent is None else 2 * cotangent.double().abs()
        terms_of_rows = abs(options.get("scale", 1.0)) * weight / case.pred.double().norm(dim=-1)
        size = size + terms_of_rows.norm()
    one = torch.finfo(grad.dtype).eps * exact_grad.norm()
    error, eager_error = (grad.double() - exact_grad).norm(), (eager_grad.double() - exact_grad).norm().nan_to_num(0.0)
    assert error <= 2 * eager_error + one + 4 * eps * size, (error, eager_error, size)


def assert_close(value: Tensor, exact: Tensor, eager: Tensor, roundings: Tensor) -> None:
    # eager in float16 may have left its range
    error, eager_error = (value.double() - exact).abs(), (eager.double() - exact).abs().nan_to_num(0.0, 0.0)
    both_nan = value.isnan() & exact.isnan()
    assert bool((both_nan | (error <= 2 * eager_error + roundings)).all()), (error, eager_error, roundings)
