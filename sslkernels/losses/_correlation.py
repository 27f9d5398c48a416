# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins, VICReg, TiCo and FroSSL as functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed import Batch
from sslkernels.distributed.correlation import product_frobenius, two_view_correlation, two_view_covariance
from sslkernels.losses import _common as common
from sslkernels.reference._precision import full_precision

VARIANTS = ("code", "paper")
EPS = 1e-12  # of torch.nn.functional.normalize


@distributed.raises_together
def barlow_twins_loss(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 5e-3,
    *,
    process_group: Any = None,
    strategy: str | None = None,
) -> Tensor:
    """Barlow Twins: the features of two views agree one by one, and tell different things.

        u, v = columns of z_a and z_b with mean 0 and variance 1          (x - mean) / sqrt(biased variance + 1e-5)
        c = u^T v / N                                                     (D, D), not stored where N < D / 2
        loss_i = (1 - c_ii)^2 + lambda_param sum_{j != i} c_ij^2
        loss = sum of the features' loss_i

    Neither mean nor scale of a feature matters. The sum is over features, so the loss grows with D.

    Args:
        z_a, z_b: (N, D), N > 1: one row a sample, the two views.
        lambda_param: weight of the redundancy; the original's training takes 0.0051.
        process_group, strategy: as in `distributed.Group`; means, variances and products are then over the rows of all
            ranks. Rows travel while all of them are at most D / 2; beyond, sums of (D, D) do, whatever the strategy.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; one row or none.

    Example:
        >>> z_a, z_b = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> barlow_twins_loss(z_a, z_b).backward()

    Source: Zbontar et al. 2021, `main.py::BarlowTwins.forward` in one process; lightly `BarlowTwinsLoss`.
    """
    _check_views(z_a=z_a, z_b=z_b)
    check_weight("lambda_param", lambda_param)
    batch = distributed.batch(process_group, strategy, "barlow_twins_loss", z_a=z_a, z_b=z_b, lambda_param=lambda_param)
    _check_rows(batch, z_a=z_a)
    return two_view_correlation(batch, z_a, z_b, lambda_param)


@distributed.raises_together
def vicreg_loss(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
    *,
    variant: str = "code",
    process_group: Any = None,
    strategy: str | None = None,
) -> Tensor:
    """VICReg: views agree (invariance), each feature varies (variance), no two say the same (covariance).

        loss_i = (z_a_i - z_b_i)^2, its mean over the features of row i
        v(z) = mean_d max(0, 1 - sqrt(var_d + eps))             variance of feature d, divided by N - 1
        c(z) = sum_{i != j} cov_ij^2 / D                        covariance, divided by N - 1
        loss = lambda_param mean_i loss_i + mu_param (v(z_a) + v(z_b)) / 2 + nu_param (c(z_a) + c(z_b))

    variant="code" is this, the authors' code, as lightly has it: the variance is halved, the covariance is not.
    variant="paper" halves neither: the paper's algorithm 1, as solo-learn has it, the same as twice the `mu_param`.
    The paper's equation 5 also takes the sum over the features in loss_i, where its algorithm and every code take the
    mean: multiply `lambda_param` by D for that.

    Args:
        z_a, z_b: (N, D), N > 1: one row a sample, the two views. (N, ..., D): the mean over the positions in between
            of the loss at each, as in lightly.
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        eps: added to the variance.
        variant: "code" or "paper".
        process_group, strategy: as in `barlow_twins_loss`.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; one row or none; a weight or a variant not as said.

    Example:
        >>> z_a, z_b = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> vicreg_loss(z_a, z_b).backward()

    Source: Bardes et al. 2022, `main_vicreg.py::VICReg.forward` in one process; lightly `VICRegLoss`.
    """
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        check.tensor(name, z)
        if z.ndim < 2:
            raise ValueError(f"{name} must be (rows, features) or (rows, ..., features), got shape {tuple(z.shape)}")
    if z_a.shape != z_b.shape:
        raise ValueError(f"z_b must have the shape of z_a {tuple(z_a.shape)}, got {tuple(z_b.shape)}")
    positions = list(zip(z_a.flatten(1, -2).unbind(1), z_b.flatten(1, -2).unbind(1))) if z_a.ndim > 2 else [(z_a, z_b)]
    if not positions:
        raise ValueError(f"z_a must have at least one position, got shape {tuple(z_a.shape)}")
    check_vicreg(lambda_param, mu_param, nu_param, eps, variant)
    weights = {
        "invariance": lambda_param,
        "variance": mu_param / 2 if variant == "code" else mu_param,
        "covariance": nu_param,
    }
    for a, b in positions:
        _check_views(z_a=a, z_b=b)
    batch = distributed.batch(
        *(process_group, strategy, "vicreg_loss"),
        z_a=z_a, z_b=z_b, lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param, eps=eps, variant=variant,
    )  # fmt: skip
    _check_rows(batch, z_a=z_a)
    losses = [two_view_covariance(batch, a, b, **weights, eps=eps) for a, b in positions]
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


@distributed.raises_together
def tico_loss(
    z_a: Tensor,
    z_b: Tensor,
    covariance: Tensor | None = None,
    beta: float = 0.9,
    rho: float = 8.0,
    *,
    through_batch: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """TiCo: views agree, and no row lies where the rows so far, a moving average of theirs, have lain.

        u, v = rows of z_a and z_b of unit length
        B = u^T u / N
        C = beta covariance + (1 - beta) B                      (D, D); starts from zero
        loss_i = 1 - <u_i, v_i> + rho u_i^T C u_i
        loss = mean of the rows

    B is a constant in C, so the second term's gradient is 2 rho C u / N: the paper's figure, and lightly.
    `through_batch=True` differentiates B as well, as the port sayannag/TiCo-pytorch does; the value is the same. The
    paper's equation 4 has the 1, its pseudo-code has not.

    Args:
        z_a, z_b: (N, D), N > 1: one row a sample, the two views; z_b is usually a momentum encoder's, without gradient.
        covariance: C of the call before, (D, D), symmetric, a constant, moved to where z_a is; None: zero.
        beta: how much of it stays.
        rho: weight of the covariance.
        through_batch: see above.
        process_group: as in `distributed.Group`; B is then over the rows of all ranks, and C the same on each.

    Returns:
        loss, (), and C, (D, D), without gradient, for the next call.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; one row or none; a weight not as said.

    Example:
        >>> z_a, z_b = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss, covariance = tico_loss(z_a, z_b)
        >>> loss, covariance = tico_loss(z_a, z_b, covariance)

    Source: Zhu et al. 2022 (arXiv:2206.10698); lightly `TiCoLoss`, whose pull requests 1016 and 1484 discuss the paper.
    """
    _check_views(z_a=z_a, z_b=z_b)
    check_tico(beta, rho)
    d = z_a.shape[1]
    if covariance is not None:
        check.floating("covariance", covariance)
        if covariance.shape != (d, d):
            raise ValueError(f"covariance must have shape ({d}, {d}), got {tuple(covariance.shape)}")
    batch = distributed.batch(
        *(process_group, None, "tico_loss"),
        z_a=z_a, z_b=z_b, covariance=covariance, beta=beta, rho=rho, through_batch=through_batch,
    )  # fmt: skip
    _check_rows(batch, z_a=z_a)
    u, v = common.normalize(common.wide(z_a)), common.normalize(common.wide(z_b))
    total = batch.total(u)
    rows = total / batch.world
    with torch.no_grad(), full_precision(u):
        if batch.local:
            share, old = (1 - beta) / len(u), covariance
            c = share * (u.T @ u) if old is None else torch.addmm(old.to(u), u.T, u, beta=beta, alpha=share)
        else:
            new = (1 - beta) / total * batch.sum(u.T @ u)
            c = new if covariance is None else torch.add(new, covariance.to(u), alpha=beta)
        pull = u @ c
        energy = (u * pull).sum() / rows
        if through_batch:
            pull += share * torch.linalg.multi_dot([u, u.T, u]) if batch.local else u @ new
    # The gradient is twice `pull`, which is at hand: autograd would multiply by C once more. It could be differentiated
    # again, wrongly, if the op that normalizes did not refuse.
    slope = 2 * (u * pull).sum() / rows
    loss = 1 - batch.mean(common.row_dot(u, v)) + rho * (energy + (slope - slope.detach()))
    return loss, c


@distributed.raises_together
def frossl_loss(
    z_views: Sequence[Tensor],
    invariance_weight: float = 1.0,
    *,
    process_group: Any = None,
    strategy: str | None = None,
) -> Tensor:
    """FroSSL: the features of each view are uncorrelated, by the Frobenius norm alone; every view is near their mean.

        u_v = columns of z_views[v] of unit length                        (N, D), V views; the mean stays
        m = mean of the u_v
        loss_i = log ||u_i^T u_i||_F^2 - 2 log trace(u_i^T u_i)
                 + invariance_weight (V / N) ||u_i - m||_F^2              a view's; trace = D where no column is zero
        loss = sum of the views

    This is the paper's loss as lightly and solo-learn have it. The authors' own code has been other things: columns
    with mean and deviation taken out, a mean squared error between the two views (its first form), and rows of length
    sqrt(D) in place of the columns (its later, "multiview" form). lightly's trace is a Python number, a constant in
    the gradient; here it is no number, and the gradient is the same, as the trace of unit columns does not move.

    Args:
        z_views: at least two tensors (N, D), N > 1: one row a sample.
        invariance_weight: weight of the second term.
        process_group, strategy: as in `barlow_twins_loss`, but rows travel while all of them are at most 3/4 D.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: less than two views; other shapes, dtypes or devices; one row or none.

    Example:
        >>> views = [torch.randn(8, 16, requires_grad=True) for _ in range(3)]
        >>> frossl_loss(views).backward()

    Source: Skean et al. 2024 (arXiv:2310.02903); lightly `FroSSLLoss`; solo-learn `solo/losses/frossl.py`.
    """
    if not isinstance(z_views, Sequence):
        raise TypeError(f"z_views must be a list of tensors, got {type(z_views).__name__}")
    count = len(z_views)
    if count < 2:
        raise ValueError(f"z_views must hold at least two views, got {count}")
    for i in range(1, count):
        _check_views(**{"z_views[0]": z_views[0], f"z_views[{i}]": z_views[i]})
    check_weight("invariance_weight", invariance_weight)
    # all have the rows of the first, so that those of the others, any number of views, need not be compared
    others = {} if process_group is None else {f"z_views[{i}]": z_views[i][:0] for i in range(1, count)}
    brought = {"z_views[0]": z_views[0], **others, "invariance_weight": invariance_weight}
    batch = distributed.batch(process_group, strategy, "frossl_loss", **brought)
    _check_rows(batch, **{"z_views[0]": z_views[0]})
    lengths = _lengths(batch, [common.wide(z) for z in z_views])
    views = [common.wide(z) / length.clamp_min(EPS) for z, length in zip(z_views, lengths)]
    center = sum(views[1:], views[0]) / count
    rows: Any = batch.total(center) / batch.world
    loss = invariance_weight * count / rows * sum((u - center).square().sum() for u in views)
    for u, length in zip(views, lengths):
        trace = (length / length.clamp_min(EPS)).detach().square().sum()
        loss = loss + product_frobenius(batch, u).log() - 2 * trace.log()
    return loss


def _lengths(batch: Batch, views: list[Tensor]) -> list[Tensor]:
    """Of the views' columns, over the rows of all ranks."""
    if batch.local:
        return [torch.linalg.vector_norm(z, dim=0) for z in views]
    squares = batch.sum(torch.stack([z.square().sum(0) for z in views]))
    return list(squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt())  # a column of zeros has gradient 0


def _check_views(**views: Any) -> None:
    common.check_pair(None, **views)
    name, z = next(iter(views.items()))
    if z.shape[1] == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(z.shape)}")


def _check_rows(batch: Batch, **views: Tensor) -> None:
    """Several ranks have more than one."""
    name, z = next(iter(views.items()))
    if batch.local and z.shape[0] == 1:
        raise ValueError(f"{name} must have more than one row, got shape {tuple(z.shape)}")


def check_weight(name: str, x: Any) -> None:
    check.in_range(name, x, 0.0, math.inf)


def check_vicreg(lambda_param: float, mu_param: float, nu_param: float, eps: float, variant: str) -> None:
    for name, x in (("lambda_param", lambda_param), ("mu_param", mu_param), ("nu_param", nu_param)):
        check_weight(name, x)
    check.positive("eps", eps)
    check.choice("variant", variant, VARIANTS)


def check_tico(beta: float, rho: float) -> None:
    check.in_range("beta", beta, 0.0, 1.0)
    check_weight("rho", rho)
