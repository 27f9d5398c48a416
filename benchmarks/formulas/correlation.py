# SPDX-License-Identifier: Apache-2.0
"""Published formulas of the redundancy-reduction losses, written out; run in float64 they judge every contender."""

import torch
from torch import Tensor


def standardize(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5), column by column, variance over N."""
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + 1e-5).sqrt()


def off_diagonal(matrix: Tensor) -> Tensor:
    """Sum of the squares of what is not on the diagonal."""
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool), 0).square().sum()


def barlow_twins(z_a: Tensor, z_b: Tensor, lambda_param: float) -> Tensor:
    """sum_i (1 - c_ii)^2 + lambda sum_{i != j} c_ij^2; c = standard(z_a)^T standard(z_b) / N."""
    c = standardize(z_a).T @ standardize(z_b) / len(z_a)
    return (1 - c.diagonal()).square().sum() + lambda_param * off_diagonal(c)


def vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    """25 mean (a - b)^2 + 25 (v(a) + v(b)) / 2 + c(a) + c(b), as the authors' code has it; v the mean over columns of
    relu(1 - sqrt(var + 1e-4)), c the off-diagonal squares of the covariance over D; both over N - 1."""
    loss = 25 * (z_a - z_b).square().mean()
    for z in (z_a, z_b):
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        loss = loss + 12.5 * (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        loss = loss + off_diagonal(covariance) / z.shape[1]
    return loss


def unit_rows(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)


def tico(z_a: Tensor, z_b: Tensor, covariance: Tensor, beta: float, rho: float) -> tuple[Tensor, Tensor]:
    """1 - mean <a_n, b_n> + rho mean <a_n, C a_n>, rows of norm 1; the new C = beta C + (1 - beta) a^T a / N has no
    gradient."""
    a, b = unit_rows(z_a), unit_rows(z_b)
    new = beta * covariance + (1 - beta) * (a.T @ a).detach() / len(a)
    return 1 - (a * b).sum(1).mean() + rho * ((a @ new) * a).sum(1).mean(), new


def frossl(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Over views z of V, columns of norm 1: sum of log (||z^T z||_F / tr z^T z)^2 + V D mean (z - mean of the views)^2;
    the trace is D."""
    views = [z / z.norm(dim=0) for z in (z_a, z_b)]
    middle = (views[0] + views[1]) / 2
    loss = z_a.new_zeros(())
    for z in views:
        width = z.shape[1]
        loss = loss + ((z.T @ z).square().sum() / width**2).log() + 2 * width * (z - middle).square().mean()
    return loss
