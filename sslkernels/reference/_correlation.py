# SPDX-License-Identifier: Apache-2.0
"""The correlation ops as the dispatcher calls them where no compiled kernel serves, in plain PyTorch.

Signatures are the schemas'. Gradients are written out, because autograd does not record below the dispatcher; those
that nobody wants are empty.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.reference._precision import compute_dtype, full_precision
from sslkernels.reference.correlation import center, column_variance, product


def standardize_forward(x, eps, unbiased):
    dtype = compute_dtype(x)
    mean = x.to(dtype).mean(0)
    rest = (x.to(dtype) - mean).mean(0)
    centered = (x.to(dtype) - mean) - rest
    inverse = (column_variance(centered, unbiased) + eps).rsqrt()
    return (centered * inverse).to(x.dtype).contiguous(), torch.stack([mean, rest, inverse])


def standardize_backward(grad, x, moments, unbiased):
    mean, rest, inverse = moments
    z = ((x.to(mean.dtype) - mean) - rest) * inverse
    return _through_standardize(grad.to(z.dtype), z, inverse, unbiased).to(x.dtype).contiguous()


def _through_standardize(grad: Tensor, z: Tensor, inverse: Tensor, unbiased: bool = False) -> Tensor:
    along = (grad * z).sum(0) / (len(z) - 1 if unbiased else len(z))
    return (grad - grad.mean(0) - z * along) * inverse


def _gradients(wanted, like: Tensor, *compute) -> tuple[Tensor, ...]:
    with full_precision(like):
        return tuple(f() if w else like.new_empty(0) for w, f in zip(wanted, compute))


def product_frobenius(a, b, off_diagonal, output_mask):
    dtype = compute_dtype(a, a if b is None else b)
    u = a.to(dtype)
    v = u if b is None else b.to(dtype)
    c = product(u, v, off_diagonal)
    da, db = _gradients(output_mask, u, lambda: v @ c.T * (4 if b is None else 2), lambda: u @ c * 2)
    return c.square().sum(), da, db


def two_view_correlation(x, y, lambda_param, eps, output_mask):
    dtype, n = compute_dtype(x, y), len(x)
    (u, (*_, su)), (v, (*_, sv)) = (standardize_forward(view.to(dtype), eps, False) for view in (x, y))
    diagonal = (u * v).mean(0)
    c = product(u, v, True) / n
    weight = 2 / n * (lambda_param * c - torch.diag(1 - diagonal))
    dx, dy = _gradients(
        output_mask,
        u,
        lambda: _through_standardize(v @ weight.T, u, su),
        lambda: _through_standardize(u @ weight, v, sv),
    )
    return (1 - diagonal).square().sum() + lambda_param * c.square().sum(), dx, dy


def two_view_covariance(x, y, weights, gamma, eps, output_mask):
    dtype = compute_dtype(x, y)
    (n, d), (invariance, spread, covariance) = x.shape, weights
    difference = x.to(dtype) - y.to(dtype)
    loss = invariance * difference.square().mean()
    grads = []
    for view, sign in ((x, 1), (y, -1)):
        u = center(view, dtype)
        std = (column_variance(u, True) + eps).sqrt()
        c = product(u, u, True) / (n - 1)
        loss = loss + spread * (gamma - std).relu().mean() + covariance / d * c.square().sum()
        hinge = -spread / d * (std < gamma).to(dtype) / (std * (n - 1))

        def grad(u=u, c=c, hinge=hinge, sign=sign):
            # both terms are of mean zero over the rows already
            return 2 * sign * invariance / (n * d) * difference + hinge * u + 4 * covariance / (d * (n - 1)) * (u @ c)

        grads.append(grad)
    return loss, *_gradients(output_mask, difference, *grads)
