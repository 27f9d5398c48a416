# SPDX-License-Identifier: Apache-2.0
"""Schemas and computation of the correlation ops over a batch that several ranks hold; `correlation.py` calls them.

Each returns the value of the whole batch, alike on all ranks, and emits its gradients for the own rows: the forward
knows them but for a number, the sum of what arrives at the ranks in backward (`collectives.shared`).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.distributed import _collectives as collectives
from sslkernels.distributed._collectives import row_counts
from sslkernels.distributed._product import norm
from sslkernels.distributed._trips import Route, Tensors
from sslkernels.ops._correlation import scalar
from sslkernels.reference._precision import compute_dtype, full_precision

_ROUTE = "Tensor? sizes, SymInt rank, SymInt world, str strategy, str group"


def _route(x: Tensor, sizes: Tensor | None, rank: int, world: int, strategy: str, group: str) -> Route:
    return Route(rank, row_counts(x.shape[0], sizes, world), group, strategy, half=False)


class Centered(NamedTuple):
    """Two views without the means of their columns over all ranks; sums over all rows, by column, in float64.

    The mean is in two parts, as one float32 of a column far from zero is rounded.
    """

    views: list[Tensor]
    mean: Tensor  # (2, D)
    rest: Tensor
    squares: Tensor  # (2, D)
    both: Tensor  # (D,), the sum of what `of` was asked to sum

    @classmethod
    def of(cls, views: Sequence[Tensor], route: Route, both: Callable[[Tensor, Tensor], Tensor]) -> Centered:
        """both: a function of the two views without the first part of their mean, to be summed as well."""
        dtype, n = compute_dtype(*views), sum(route.counts)

        def all_sums(*columns: Tensor) -> Tensor:
            return collectives.all_sum(torch.stack([x.double() for x in columns]), route.group)

        mean = (all_sums(*(x.to(dtype).sum(0) for x in views)) / n).to(dtype)
        a, b = centered = [x.to(dtype) - m for x, m in zip(views, mean)]
        sums = all_sums(a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), both(a, b).sum(0))
        rest = (sums[:2] / n).to(dtype)
        for x, r in zip(centered, rest):
            x.sub_(r)
        squares = (sums[2:4] - sums[:2].square() / n).clamp_min(0)
        return cls(centered, mean, rest, squares, sums[4])

    def same(self, x: Tensor, view: int) -> Tensor:
        """Rows of another rank, treated as the own ones were."""
        return (x.to(self.mean.dtype) - self.mean[view]).sub_(self.rest[view])


def _correlation(x, y, lambda_param, eps, sizes, rank, world, strategy, group, output_mask):
    with full_precision(x):
        route = _route(x, sizes, rank, world, strategy, group)
        batch, n = Centered.of((x, y), route, torch.mul), sum(route.counts)
        factors = (batch.squares / n + eps).rsqrt()
        inverse = factors.to(batch.mean.dtype)
        views = [z.mul_(s) for z, s in zip(batch.views, inverse)]
        diagonal = (batch.both / n - batch.rest.double().prod(0)) * factors.prod(0)

        def arrive(held):
            return [batch.same(z, v).mul_(inverse[v]) for v, z in enumerate(held)]

        value, grads = norm(route, views, True, [diagonal * n] * 2, output_mask, *_cargo((x, y), views, arrive))
        value = (1 - diagonal).square().sum() + lambda_param / n**2 * value
        slope = (-2 / n * (1 - diagonal)).to(inverse.dtype)
        found = [(grad, view, v) for v, (grad, view) in enumerate(zip(grads, views)) if grad is not None]
        for grad, _, v in found:
            grad.mul_(lambda_param / n**2).add_(views[1 - v] * slope)
        if found:
            # through the deviation; not the mean, as that of the gradient is zero: the other view's is
            along = torch.stack([(grad * view).sum(0).double() for grad, view, _ in found])
            along = (collectives.all_sum(along, group) / n).to(inverse.dtype)
            for (grad, view, v), share in zip(found, along):
                grad.sub_(view * share).mul_(inverse[v])
        return _outputs(value, grads, inverse)


def _covariance(x, y, weights, gamma, eps, sizes, rank, world, strategy, group, output_mask):
    with full_precision(x):
        route = _route(x, sizes, rank, world, strategy, group)
        n, d, dtype = sum(route.counts), x.shape[1], compute_dtype(x, y)
        invariance, spread, covariance = weights
        difference = x.to(dtype) - y.to(dtype)
        batch = Centered.of((x, y), route, lambda a, b: difference.square())

        def arrive(held):
            return [batch.same(z, v) for v, z in enumerate(held)]

        cargo = _cargo((x, y), batch.views, arrive)
        value, grads = norm(route, batch.views, False, list(batch.squares), output_mask, *cargo)
        std = (batch.squares / (n - 1) + eps).sqrt()
        value = covariance / (d * (n - 1) ** 2) * value + spread * (gamma - std).relu().mean(1).sum()
        value = value + invariance / (n * d) * batch.both.sum()
        hinges = ((std < gamma) / std * (-spread / (d * (n - 1)))).to(dtype)
        for grad, view, hinge, sign in zip(grads, batch.views, hinges, (1, -1)):
            if grad is not None:
                grad.mul_(covariance / (d * (n - 1) ** 2)).add_(view * hinge)
                grad.add_(difference, alpha=sign * 2 * invariance / (n * d))
        return _outputs(value, grads, batch.mean)


def _frobenius(a, b, sizes, rank, world, strategy, group, output_mask):
    assert b is None  # of a with itself alone
    with full_precision(a):
        route = _route(a, sizes, rank, world, strategy, group)
        views = [a.to(compute_dtype(a))]
        value, (grad,) = norm(route, views, False, None, output_mask[:1], views, list)
        return _outputs(value, [grad, None], views[0])


def _cargo(rows: Sequence[Tensor], views: Tensors, arrive: Callable[[Tensors], Tensors]) -> tuple[Tensors, Any]:
    """What travels, and what it becomes where it arrives: the views, or the rows they are made of if these are less."""
    narrow = all(x.element_size() < views[0].element_size() for x in rows)
    return (list(rows), arrive) if narrow else (views, list)


def _outputs(value: Tensor, grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return value.to(like.dtype), *(like.new_empty(0) if grad is None else grad for grad in grads)


correlation = scalar(
    f"distributed_correlation(Tensor x, Tensor y, float lambda_param, float eps, {_ROUTE}", _correlation, True
)
covariance = scalar(
    f"distributed_covariance(Tensor x, Tensor y, float[3] weights, float gamma, float eps, {_ROUTE}", _covariance, True
)
frobenius = scalar(f"distributed_frobenius(Tensor a, Tensor? b, {_ROUTE}", _frobenius, True)
