# SPDX-License-Identifier: Apache-2.0
"""The losses' formulas over whole matrices: the truth in float64, and what eager code gives in any other dtype.

Each is the form that people use: cross_entropy over all logits, in the way of lightly, open_clip, MoCo and the authors
of SupCon. Nothing here comes from the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INF = torch.inf


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bool)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def nt_xent(out0: Tensor, out1: Tensor, temperature: Any = 0.5, *, normalize: bool = True, **options: Any) -> Tensor:
    n, z = len(out0), torch.cat([out0, out1])
    z = unit(z) if normalize else z
    logits = (z @ z.T / temperature)[~eye(2 * n)].view(2 * n, 2 * n - 1)
    partner = torch.arange(2 * n).roll(n)
    labels = partner - (partner > torch.arange(2 * n)).long()  # without the diagonal later columns move down by one
    return F.cross_entropy(logits, labels, **options)


def hard_nt_xent(out0: Tensor, out1: Tensor, temperature: Any, *, beta: float, tau_plus: float) -> Tensor:
    """As the criterion in Robinson et al.'s code, whose `debiased` form is beta = 0."""
    n, z = len(out0), unit(torch.cat([out0, out1]))
    negative = torch.exp(z @ z.T / temperature)[~eye(n).repeat(2, 2)].view(2 * n, 2 * n - 2)
    positive = torch.exp((unit(out0) * unit(out1)).sum(1) / temperature).repeat(2)
    importance = negative**beta
    reweighted = (importance * negative).sum(1) / importance.mean(1)
    total = (reweighted - tau_plus * (2 * n - 2) * positive) / (1 - tau_plus)
    floor = torch.exp(torch.as_tensor(-1 / temperature, dtype=z.dtype))
    total = torch.maximum(total, (2 * n - 2) * floor) if tau_plus else total
    return torch.log1p(total / positive).mean()  # they write -log(positive / (positive + total)), which is 0 too early


def info_nce_logits(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: Any,
    in_batch: bool = False,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    q, k, extra = (x if x is None or not normalize else unit(x) for x in (query, key, negatives))
    columns, labels = [(q * k).sum(1, keepdim=True)], torch.zeros(len(q), dtype=torch.long)
    if in_batch or negatives is None:
        columns, labels = [q @ k.T], torch.arange(len(q))
    if extra is not None:
        columns.append(q @ extra.T if extra.ndim == 2 else torch.einsum("nd,nmd->nm", q, extra))
    return torch.cat(columns, dim=1) / temperature, labels


def info_nce(
    query: Tensor, key: Tensor, negatives: Tensor | None = None, temperature: Any = 0.1, **options: Any
) -> Tensor:
    pairs = {name: options.pop(name) for name in ("in_batch", "normalize") if name in options}
    return F.cross_entropy(*info_nce_logits(query, key, negatives, temperature, **pairs), **options)


def clip(image: Tensor, text: Tensor, scale: Any, bias: Any = 0.0, **options: Any) -> Tensor:
    logits, labels = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, labels, **options) + F.cross_entropy(logits.T, labels, **options)) / 2


def siglip_rows(image: Tensor, text: Tensor, scale: Any, bias: Any = 0.0, label_smoothing: float = 0.0) -> Tensor:
    logits = scale * image @ text.T + bias
    target = eye(len(image)).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum(1)


def siglip(image: Tensor, text: Tensor, scale: Any, bias: Any = 0.0, **options: Any) -> Tensor:
    return siglip_rows(image, text, scale, bias, **options).mean()


def supcon_rows(
    features: Tensor, labels: Tensor, temperature: Any = 0.1, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The rows' losses, and which of them have a positive."""
    z, n = unit(features), len(features)
    log_prob = (z @ z.T / temperature).masked_fill(eye(n), -INF).log_softmax(1).masked_fill(eye(n), 0.0)
    positive = (labels[:, None] == labels) & ~eye(n)
    count = positive.sum(1)
    rows = -(log_prob * positive).sum(1) / count.clamp(min=1)
    rows = (1 - label_smoothing) * rows - label_smoothing * log_prob.sum(1) / (n - 1)
    return rows.where(count > 0, 0.0), count > 0


def supcon(features: Tensor, labels: Tensor, temperature: Any = 0.1, **options: Any) -> Tensor:
    rows, present = supcon_rows(features, labels, temperature, **options)
    return rows[present].mean()


def dcl_rows(
    out0: Tensor, out1: Tensor, temperature: Any = 0.1, weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """(2, N): each view's rows, equation 6 of the paper with the two views' negatives in one sum."""
    n, z0, z1 = len(out0), unit(out0), unit(out1)
    rows = []
    for a, b in ((z0, z1), (z1, z0)):
        same = (a @ a.T / temperature)[~eye(n)].view(n, n - 1)
        cross = a @ b.T / temperature
        positive = cross.diagonal() * (1.0 if weight_fn is None else weight_fn(a, b))
        rows.append(torch.cat([same, cross[~eye(n)].view(n, n - 1)], dim=1).logsumexp(1) - positive)
    return torch.stack(rows)


def dcl(out0: Tensor, out1: Tensor, temperature: Any = 0.1, weight_fn: Any = None) -> Tensor:
    return dcl_rows(out0, out1, temperature, weight_fn).mean()


def gradients(loss: Tensor, inputs: dict[str, Tensor], cotangent: Tensor | None = None) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), cotangent)))


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Fresh leaves with gradient, of the same values."""
    return {name: x.detach().to(dtype or x.dtype).clone().requires_grad_() for name, x in inputs.items()}


def relative(x: Tensor, truth: Tensor) -> float:
    """Relative error by norm, in float64."""
    return float((x.double() - truth).detach().norm() / truth.detach().norm())


def errors(loss: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of value and gradients against `truth` in float64 on the same inputs; each is one backward.

    A result that is not a scalar is contracted with one random cotangent, positive, as the gradient of a scalar (scale,
    bias) would cancel otherwise, and its relative error mean nothing.
    """
    mine, exact = leaves(inputs), leaves(inputs, torch.float64)
    value, true_value = loss(**mine), truth(**exact)
    if value.shape != true_value.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, the formula has {tuple(true_value.shape)}")
    cotangent = torch.rand(true_value.shape, dtype=torch.float64) + 0.5 if true_value.ndim else torch.ones(()).double()
    got = gradients(value, mine, cotangent.to(value.dtype))
    want = gradients(true_value, exact, cotangent.to(value.dtype).double())
    return {"value": relative(value, true_value), **{name: relative(got[name], want[name]) for name in inputs}}


def bound(dtype: torch.dtype, max_logit: float) -> float:
    """The library's promise: 4 eps max|logit|, and never asked to be below 84 eps, which is 1e-5 in float32."""
    return torch.finfo(dtype).eps * max(84.0, 4.0 * max_logit)


def assert_close(found: dict[str, float], tolerance: float) -> None:
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    assert not wrong, f"relative errors {wrong} above {tolerance:.2e}"
