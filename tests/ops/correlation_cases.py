# SPDX-License-Identifier: Apache-2.0
"""The correlation ops as the originals write them: in float64 the truth, in the input's precision what eager gives.

Beside each, how large the terms are that its value and its gradients are sums of: what rounding errors scale with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops
from sslkernels.reference import correlation as reference

LAMBDA, EPS, VICREG_EPS = 5e-3, 1e-5, 1e-4


class Op(NamedTuple):
    """`sizes` takes float64 views and gives the size of the value's terms, then of each gradient's."""

    ours: Callable[..., Tensor]
    written_out: Callable[..., Tensor]
    sizes: Callable[..., Sequence[Tensor]]
    views: int = 2
    wider: bool = False  # the second view may have another width


def off_diagonal(c: Tensor) -> Tensor:
    """Barlow Twins' and VICReg's `off_diagonal`."""
    n = len(c)
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def barlow_twins(x: Tensor, y: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True, eps=EPS) for z in (x, y))
    c = a.T @ b / len(x)
    return (torch.diagonal(c) - 1).pow(2).sum() + LAMBDA * off_diagonal(c).pow(2).sum()


def vicreg(x: Tensor, y: Tensor) -> Tensor:
    """`VICReg.forward` with the paper's variance term."""
    n, d = x.shape
    loss = 25.0 * F.mse_loss(x, y)
    for z in (x, y):
        z = z - z.mean(dim=0)
        cov = (z.T @ z) / (n - 1)
        loss = loss + 25.0 * F.relu(1 - torch.sqrt(z.var(dim=0) + VICREG_EPS)).mean()
        loss = loss + off_diagonal(cov).pow(2).sum() / d
    return loss


def batch_norm(x: Tensor, unbiased: bool = False) -> Tensor:
    if not unbiased:
        return F.batch_norm(x, None, None, training=True, eps=EPS)
    return (x - x.mean(0)) / (x.var(0) + EPS).sqrt()


def fixed_weights(x: Tensor) -> Tensor:
    """A cotangent without order that depends on the shape alone."""
    return (torch.arange(x.numel(), dtype=torch.float64) * 12.9898).sin().reshape(x.shape).to(x.dtype)


def weighted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def value(x: Tensor, **options: Any) -> Tensor:
        z = function(x, **options)
        return (z.to(torch.promote_types(z.dtype, torch.float32)) * fixed_weights(x.float())).sum()

    return value


def standard_sizes(unbiased: bool) -> Callable[[Tensor], Sequence[Tensor]]:
    def sizes(x: Tensor) -> Sequence[Tensor]:
        inverse = (x.var(0, correction=int(unbiased)) + EPS).rsqrt()
        weights = fixed_weights(x.float()).double()
        return (batch_norm(x, unbiased) * weights).abs().sum(), (weights * inverse).norm()

    return sizes


def product_sizes(a: Tensor, b: Tensor | None = None) -> Sequence[Tensor]:
    other = a if b is None else b
    value = (a.T @ other).norm() * a.norm() * other.norm()
    if b is None:
        return value, 4 * a.norm() ** 3
    return value, 2 * a.norm() * b.norm() ** 2, 2 * a.norm() ** 2 * b.norm()


def barlow_sizes(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    n, d = x.shape
    terms = 1 + (batch_norm(x) * batch_norm(y)).mean(0).abs()
    grads = []
    for z in (x, y):
        by_column = 2 / n * (terms * n**0.5 + LAMBDA * n**0.5 * d)
        grads.append((by_column * (z.var(0, correction=0) + EPS).rsqrt()).norm())
    return barlow_twins(x, y) + d * (1 + LAMBDA), *grads


def vicreg_sizes(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    n, d = x.shape
    value, grads = 25 * F.mse_loss(x, y), []
    for z in (x, y):
        c = z - z.mean(0)
        std = (c.var(0) + VICREG_EPS).sqrt()
        value = value + 25 * (1 + std.mean()) + (c.T @ c).norm() * c.norm() ** 2 / (d * (n - 1) ** 2)
        hinge, products = (25 / d * c / (std * (n - 1))).norm(), 4 * c.norm() ** 3 / (d * (n - 1) ** 2)
        grads.append(50 / (n * d) * (x - y).norm() + hinge + products)
    return value, *grads


def product(a: Tensor, b: Tensor | None = None) -> Tensor:
    return (a.T @ (a if b is None else b)).pow(2).sum()


def off_product(a: Tensor, b: Tensor | None = None) -> Tensor:
    return off_diagonal(a.T @ (a if b is None else b)).pow(2).sum()


OPS: dict[str, Op] = {
    "standardize": Op(weighted(ops.standardize), weighted(batch_norm), standard_sizes(False), 1),
    "standardize unbiased": Op(
        lambda x: weighted(ops.standardize)(x, unbiased=True),
        lambda x: weighted(batch_norm)(x, unbiased=True),
        standard_sizes(True),
        1,
    ),
    "a^T b": Op(ops.product_frobenius, product, product_sizes, wider=True),
    "a^T b off": Op(lambda a, b: ops.product_frobenius(a, b, off_diagonal=True), off_product, product_sizes),
    "a^T a": Op(ops.product_frobenius, product, product_sizes, 1),
    "a^T a off": Op(lambda a: ops.product_frobenius(a, off_diagonal=True), off_product, product_sizes, 1),
    "two_view_correlation": Op(ops.two_view_correlation, barlow_twins, barlow_sizes),
    "two_view_covariance": Op(ops.two_view_covariance, vicreg, vicreg_sizes),
}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "standardize": weighted(reference.standardize),
    "standardize unbiased": lambda x: weighted(reference.standardize)(x, unbiased=True),
    "a^T b": reference.product_frobenius,
    "a^T b off": lambda a, b: reference.product_frobenius(a, b, off_diagonal=True),
    "a^T a": reference.product_frobenius,
    "a^T a off": lambda a: reference.product_frobenius(a, off_diagonal=True),
    "two_view_correlation": reference.two_view_correlation,
    "two_view_covariance": reference.two_view_covariance,
}
SCALARS = tuple(name for name in OPS if not name.startswith("standardize"))


def views(n: int, d: int, count: int = 2, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Views that agree somewhat, off zero, with columns of different deviation."""
    shared = torch.randn(n, d)
    deviation = 0.3 + torch.rand(d)
    return tuple(((shared + torch.randn(n, d)) * deviation + 0.5).to(dtype) for _ in range(count))


def evaluate(function: Callable[..., Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Value, and the gradient of each view."""
    leaves = [x.detach().requires_grad_() for x in xs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def eager(op: Op, xs: Sequence[Tensor]) -> list[Tensor]:
    """The originals in the precision of the input, mixed dtypes made the wider one."""
    dtype = xs[0].dtype if len(xs) == 1 else torch.promote_types(xs[0].dtype, xs[1].dtype)
    return evaluate(op.written_out, [x.to(dtype) for x in xs])


def check(name: str, xs: Sequence[Tensor], roundings: float = 8.0) -> None:
    """Never more than twice eager's error, plus some roundings of the terms (a few on the way of each)."""
    op = OPS[name]
    exact, sizes = (
        f([x.double() for x in xs]) for f in (lambda z: evaluate(op.written_out, z), lambda z: op.sizes(*z))
    )
    usual = eager(op, xs)
    got = evaluate(op.ours, xs)
    double = any(x.dtype == torch.float64 for x in xs)
    assert got[0].dtype == (torch.float64 if double else torch.float32) and got[0].shape == ()
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    for i, (g, e, u, size) in enumerate(zip(got, exact, usual, sizes, strict=True)):
        if i:
            assert (g.dtype, g.shape) == (xs[i - 1].dtype, xs[i - 1].shape)
        fits = e.abs() < torch.finfo(g.dtype).max  # of a float16 gradient
        g, e, u = g[fits], e[fits], u[fits]
        error, usual_error = (g.double() - e).norm(), (u.double() - e).norm().nan_to_num(0.0, 0.0)
        # a 16-bit gradient, or standardised view, is rounded once
        last = torch.finfo(xs[max(i - 1, 0)].dtype).eps * (e.norm() if i else 0.0)
        if not i and name.startswith("standardize"):
            last = torch.finfo(xs[0].dtype).eps * size
        assert error <= 2 * usual_error + last + roundings * eps * size, (i, error, usual_error, size)
