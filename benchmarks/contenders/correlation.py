# SPDX-License-Identifier: Apache-2.0
"""Contenders for redundancy reduction: what named peers ship, restated, and our algebra in plain PyTorch.

Everybody else makes the D x D matrix. lean makes the N x N ones, with the backward that autograd does not find: the
gradient of <a a^T, b b^T> is 2 (b b^T) a, where autograd computes (b b^T) a twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS


def without_diagonal(matrix: Tensor) -> Tensor:
    """D (D - 1) values: of D + 1 values in a row, the last is the next one on the diagonal; a copy."""
    d = len(matrix)
    return matrix.flatten()[1:].view(d - 1, d + 1)[:, :-1].flatten()


class GramProduct(torch.autograd.Function):
    """||a^T b||_F^2 in the space of the batch."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        gram_a, gram_b = a @ a.t(), b @ b.t()
        ctx.save_for_backward(a, b, gram_a, gram_b)
        return torch.dot(gram_a.flatten(), gram_b.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b, gram_a, gram_b = ctx.saved_tensors
        return (2 * grads[0] * gram_b) @ a, (2 * grads[0] * gram_a) @ b


class GramNorm(torch.autograd.Function):
    """||a^T a||_F^2 in the space of the batch."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        gram = a @ a.t()
        ctx.save_for_backward(a, gram)
        return torch.dot(gram.flatten(), gram.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        a, gram = ctx.saved_tensors
        return (4 * grads[0] * gram) @ a


class ProductNorm(torch.autograd.Function):
    """||a^T b||_F^2 in the space of the features."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        product = a.t() @ b
        ctx.save_for_backward(a, b, product)
        return torch.dot(product.flatten(), product.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b, product = ctx.saved_tensors
        return (2 * grads[0] * b) @ product.t(), (2 * grads[0] * a) @ product


# --- Batch statistics --------------------------------------------------------------------------------------------


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def plain_standard(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, 0, correction=0)
    return (x - mean) * (var + 1e-5).rsqrt()


def ours_standard(x: Tensor) -> Tensor:
    from sslkernels.ops import standardize

    return standardize(x)


# --- Barlow Twins ------------------------------------------------------------------------------------------------


def with_norm(inputs: Inputs) -> Inputs:
    """The authors' model owns one layer for both views, which keeps running statistics too."""
    return {**inputs, "norm": nn.BatchNorm1d(inputs["z_a"].shape[1], affine=False)}


def original_barlow(z_a: Tensor, z_b: Tensor, lambda_param: float, norm: nn.Module) -> Tensor:
    c = norm(z_a).T @ norm(z_b)
    c.div_(len(z_a))
    on_diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    return on_diagonal + lambda_param * without_diagonal(c).pow_(2).sum()


def lightly_barlow(z_a: Tensor, z_b: Tensor, lambda_param: float) -> Tensor:
    a, b = batch_norm(z_a), batch_norm(z_b)
    c = a.T @ b
    c.div_(len(z_a))
    invariance = torch.diagonal(c).add_(-1).pow_(2).sum()
    return invariance + lambda_param * without_diagonal(c).pow_(2).sum()


def solo_barlow(z_a: Tensor, z_b: Tensor, lambda_param: float) -> Tensor:
    """With a scale_loss of 1."""
    n, d = z_a.shape
    norm = nn.BatchNorm1d(d, affine=False)
    c = torch.einsum("ni,nj->ij", norm(z_a), norm(z_b)) / n
    identity = torch.eye(d, device=z_a.device)
    squares = (c - identity).pow(2)
    squares[~identity.bool()] *= lambda_param  # a gather and a scatter by boolean mask
    return 1.0 * squares.sum()


def barlow_from(a: Tensor, b: Tensor, norm: Tensor, lambda_param: float) -> Tensor:
    """a, b standard; norm = ||a^T b||_F^2, of which the diagonal takes its part back."""
    diagonal = (a * b).mean(0)
    return ((1 - diagonal).square() - lambda_param * diagonal.square()).sum() + lambda_param / len(a) ** 2 * norm


def lean_barlow(z_a: Tensor, z_b: Tensor, lambda_param: float) -> Tensor:
    a, b = batch_norm(z_a), batch_norm(z_b)
    return barlow_from(a, b, GramProduct.apply(a, b), lambda_param)


def lean_barlow_features(z_a: Tensor, z_b: Tensor, lambda_param: float) -> Tensor:
    """D x D, which is smaller beyond N = D / 2, once."""
    a, b = batch_norm(z_a), batch_norm(z_b)
    return barlow_from(a, b, ProductNorm.apply(a, b), lambda_param)


def ours_barlow(z_a: Tensor, z_b: Tensor, lambda_param: float) -> Tensor:
    from sslkernels.losses import barlow_twins_loss

    return barlow_twins_loss(z_a, z_b, lambda_param=lambda_param)


# --- VICReg ------------------------------------------------------------------------------------------------------


def original_vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    n, d = z_a.shape
    invariance = F.mse_loss(z_a, z_b)
    x, y = z_a - z_a.mean(dim=0), z_b - z_b.mean(dim=0)
    std_x, std_y = torch.sqrt(x.var(dim=0) + 0.0001), torch.sqrt(y.var(dim=0) + 0.0001)
    variance = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    cov_x, cov_y = (x.T @ x) / (n - 1), (y.T @ y) / (n - 1)
    covariance = without_diagonal(cov_x).pow_(2).sum().div(d) + without_diagonal(cov_y).pow_(2).sum().div(d)
    return 25 * invariance + 25 * variance + covariance


def lightly_vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    def variance(x: Tensor) -> Tensor:
        return torch.mean(F.relu(1.0 - torch.sqrt(x.var(dim=0) + 0.0001)))

    def covariance(x: Tensor) -> Tensor:
        x = x - x.mean(dim=0)
        n, d = x.shape
        keep = ~torch.eye(d, dtype=torch.bool)
        cov = torch.einsum("n...c,n...d->...cd", x, x) / (n - 1)
        return (cov[..., keep].pow(2).sum(-1) / d).mean()  # a boolean gather

    spread = 0.5 * (variance(z_a) + variance(z_b))
    return 25.0 * F.mse_loss(z_a, z_b) + 25.0 * spread + 1.0 * (covariance(z_a) + covariance(z_b))


def lean_vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    n, d = z_a.shape
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        x = z - z.mean(0)
        squares = x.square().sum(0)
        loss = loss + 12.5 * F.relu(1 - (squares / (n - 1) + 0.0001).sqrt()).mean()
        loss = loss + (GramNorm.apply(x) - squares.square().sum()) / (d * (n - 1) ** 2)
    return loss


def ours_vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    from sslkernels.losses import vicreg_loss

    return vicreg_loss(z_a, z_b)


# --- TiCo and FroSSL ---------------------------------------------------------------------------------------------


def lightly_tico(z_a: Tensor, z_b: Tensor, covariance: Tensor, beta: float, rho: float) -> tuple[Tensor, Tensor]:
    a, b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    auxiliary = torch.mm(a.T, a).detach() / len(a)
    new = beta * covariance + (1 - beta) * auxiliary
    loss = 1.0 - (a * b).sum(dim=1).mean() + rho * (torch.mm(a, new) * a).sum(dim=1).mean()
    return loss, new.detach()


def lean_tico(z_a: Tensor, z_b: Tensor, covariance: Tensor, beta: float, rho: float) -> tuple[Tensor, Tensor]:
    """The second moment without autograd, in one product that adds."""
    a, b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    plain = a.detach()
    new = torch.addmm(covariance, plain.t(), plain, beta=beta, alpha=(1 - beta) / len(a))
    return 1 + (a * (rho * (a @ new) - b)).sum() / len(a), new


def ours_tico(z_a: Tensor, z_b: Tensor, covariance: Tensor, beta: float, rho: float) -> tuple[Tensor, Tensor]:
    from sslkernels.losses import tico_loss

    return tico_loss(z_a, z_b, covariance, beta=beta, rho=rho)


def lightly_frossl(z_a: Tensor, z_b: Tensor) -> Tensor:
    views = [F.normalize(z, p=2, dim=0) for z in (z_a, z_b)]
    n, d = z_a.shape
    average = torch.mean(torch.stack(views), dim=0)
    regularization, invariance = z_a.new_zeros(()), z_a.new_zeros(())
    for z in views:
        cov = z.T @ z if n > d else z @ z.T
        cov = cov / torch.trace(cov).item()
        regularization = regularization + 2 * torch.log(torch.linalg.norm(cov, ord="fro"))
        invariance = invariance + len(views) * d * F.mse_loss(z, average)
    return regularization + 1.0 * invariance


def lean_frossl(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The trace is D; two views are as far from their mean as half of their difference."""
    a, b = F.normalize(z_a, dim=0), F.normalize(z_b, dim=0)
    n, d = a.shape
    entropy = (GramNorm.apply(a) / d**2).log() + (GramNorm.apply(b) / d**2).log()
    return entropy + (a - b).square().sum() / n


def ours_frossl(z_a: Tensor, z_b: Tensor) -> Tensor:
    from sslkernels.losses import frossl_loss

    return frossl_loss([z_a, z_b])


STANDARD = (
    Contender("sslkernels", ours_standard, OURS),
    Contender("torch", batch_norm, "torch.nn.functional.batch_norm, training, no running statistics"),
    Contender("lean", plain_standard, LEAN),
)
ORIGINAL_BARLOW = Contender(
    "barlowtwins", original_barlow, "facebookresearch/barlowtwins, main.py, BatchNorm1d(affine=False)",
    prepare=with_norm,
)  # fmt: skip
LIGHTLY_BARLOW = Contender("lightly", lightly_barlow, "lightly, loss/barlow_twins_loss.py, BarlowTwinsLoss")
LEAN_BARLOW = Contender("lean", lean_barlow, LEAN)
LEAN_FEATURES = Contender("lean", lean_barlow_features, LEAN)
OURS_BARLOW = Contender("sslkernels", ours_barlow, OURS)
# lightly's sequence is the original's but for the running statistics, and is timed where a step takes less.
BARLOW = (OURS_BARLOW, ORIGINAL_BARLOW, LIGHTLY_BARLOW, LEAN_BARLOW)
BARLOW_WIDE = (OURS_BARLOW, ORIGINAL_BARLOW, LEAN_BARLOW)
BARLOW_COMPILED = (*BARLOW_WIDE, ORIGINAL_BARLOW.compiled(), LEAN_BARLOW.compiled())
BARLOW_FEATURES = (
    OURS_BARLOW, ORIGINAL_BARLOW, LIGHTLY_BARLOW,
    Contender("solo-learn", solo_barlow, "solo-learn, losses/barlow.py (its scale_loss set to 1)"),
    LEAN_FEATURES,
)  # fmt: skip
VICREG = (
    Contender("sslkernels", ours_vicreg, OURS),
    Contender("vicreg", original_vicreg, "facebookresearch/vicreg, main_vicreg.py"),
    Contender("lightly", lightly_vicreg, "lightly, loss/vicreg_loss.py, VICRegLoss"),
    Contender("lean", lean_vicreg, LEAN),
)
TICO = (
    Contender("sslkernels", ours_tico, OURS),
    Contender("lightly", lightly_tico, "lightly, loss/tico_loss.py, TiCoLoss"),
    Contender("lean", lean_tico, LEAN),
)
FROSSL = (
    Contender("sslkernels", ours_frossl, OURS),
    Contender("lightly", lightly_frossl, "lightly, loss/frossl_loss.py, FroSSLLoss"),
    Contender("lean", lean_frossl, LEAN),
)
