# SPDX-License-Identifier: Apache-2.0
"""Norms of products a^T b of columns over the rows of all ranks, and their gradients, in the smaller of two spaces.

    ||a^T b||_F^2 = <a a^T, b b^T>_F

N rows in all, n here, D columns, R ranks. Per rank, forward and backward, for a^T b or for a^T a and b^T b:

    space       multiplications    numbers sent             held at once
    features    3 n D^2            2 D^2 (R - 1) / R        two panels of D^2 / 8 or 4 MiB
    Grams       4 n N D            2 N D (R - 1) / R        2 N D gathered, or 4 n D around a ring; 2 n N

In feature space every rank multiplies its rows, and panels of the products are summed over the ranks, one while the
next is computed; of a symmetric one what lies on its diagonal and to the right. In Gram space rows travel, and each
rank has the n rows of a a^T and b b^T that are its own: as both are symmetric, the gradient of a row needs nothing else
and none is sent.

So with any number of ranks Gram space computes less up to N = 3/4 D and sends less up to N = D, or 2 D where rows have
16 bits. There it is taken for the whole norm. Without the diagonal it takes digits: that is subtracted from the whole.
Up to N = D / 2 it is one bit, for columns that are not correlated; as in one process, Gram space ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.distributed import _collectives as collectives
from sslkernels.distributed._trips import SUM, Route, Tensors, trip

PANEL_BYTES = 4 << 20  # of a^T b, summed over the ranks at a time, or
PANELS = 8  # as many parts, if these are larger
LEFT = 1 / 8  # share of a norm that must be off the diagonal, for a difference to be trusted

Columns = list[Tensor]


def norm(
    route: Route,
    views: Columns,
    cross: bool,
    diagonals: Columns | None,
    wanted: Sequence[bool],
    cargo: Tensors,
    arrive: Callable[[Tensors], Columns],
) -> tuple[Tensor, list[Tensor | None]]:
    """||a^T b||_F^2 over the rows of all ranks, float64, alike on all of them, and its gradients for the own rows.

    views: own rows (n, D) of [a, b] where `cross`, else of [a, ...], each with itself, whose norms are added up.
    diagonals: those of the products; then these are left out of the norm. cargo: what travels, of which `arrive` makes
    rows like those of `views`.
    """
    n, d = sum(route.counts), views[0].shape[1]
    if n <= (3 * d // 4 if diagonals is None else d // 2):
        value, grads = _in_grams(route, views, cross, wanted, cargo, arrive)
        if diagonals is None:
            return value, grads
        partners = views[::-1] if cross else views
        for grad, partner, diagonal in zip(grads, partners, diagonals):
            if grad is not None:
                grad.sub_(partner * diagonal.to(grad.dtype), alpha=_factor(cross))
        total, value = value, value - sum(x.square().sum() for x in (diagonals[:1] if cross else diagonals))
        # Columns of very different length, or many that are zero: little but rounding would be left of the difference.
        # All ranks see the same bits, as DistributedDataParallel also relies upon. A device is not waited for.
        if value.device.type != "cpu" or not bool(value < LEFT * total):
            return value, grads
    return _in_features(route, views, cross, diagonals is None, wanted)


def _factor(cross: bool) -> int:
    """d ||a^T b||^2 / da is this times b (b^T a)."""
    return 2 if cross else 4


def _squares(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1).sum(dtype=torch.float64)


def _zeros(views: Columns, wanted: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.zeros_like(view, memory_format=torch.contiguous_format) if w else None for view, w in zip(views, wanted)
    ]


def _in_grams(
    route: Route,
    views: Columns,
    cross: bool,
    wanted: Sequence[bool],
    cargo: Tensors,
    arrive: Callable[[Tensors], Columns],
) -> tuple[Tensor, list[Tensor | None]]:
    value = torch.zeros((), dtype=torch.float64, device=views[0].device)
    grads = _zeros(views, wanted)

    def meet(others: Columns) -> None:
        grams = [view @ other.T for view, other in zip(views, others)]
        partners = grams[::-1] if cross else grams
        for gram, partner in list(zip(grams, partners))[: 1 if cross else None]:
            value.add_(_squares(gram, partner))
        for grad, partner, other in zip(grads, partners, others):
            if grad is not None:
                grad.addmm_(partner, other, alpha=_factor(cross))

    def visit(held: Tensors, rows: slice) -> Tensors:
        meet(arrive(held))
        return []

    trip(route, cargo, lambda: meet(views), visit, SUM)
    return collectives.all_sum(value, route.group), grads


def _in_features(
    route: Route, views: Columns, cross: bool, whole: bool, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    d = views[0].shape[1]
    value = torch.zeros((), dtype=torch.float64, device=views[0].device)
    grads = _zeros(views, wanted)
    pairs = [(0, 1)] if cross else [(v, v) for v in range(len(views))]
    step = max(1, PANEL_BYTES // (d * views[0].element_size()), d // PANELS)
    panels = [(pair, slice(i, min(i + step, d))) for pair in pairs for i in range(0, d, step)]

    def start(pair: tuple[int, int], rows: slice) -> tuple[Tensor, Any]:
        left, right = (views[v] for v in pair)
        # a^T a is symmetric: what lies on the diagonal and right of it
        c = left[:, rows].T @ (right if cross else right[:, rows.start :])
        return c, collectives.start_sum(c, route.group)

    def finish(pair: tuple[int, int], rows: slice, c: Tensor, work: Any) -> None:
        work.wait()
        if not whole:  # set to zero where it stands: a difference would be rounding of a whitened batch
            c.diagonal(rows.start if cross else 0).zero_()
        (a, b), (da, db) = (views[v] for v in pair), (grads[v] for v in pair)
        if cross:
            value.add_(_squares(c, c))
            if da is not None:
                da[:, rows].addmm_(b, c.T, alpha=2)
            if db is not None:
                db.addmm_(a[:, rows], c, alpha=2)
            return
        width = rows.stop - rows.start
        value.add_(_squares(c[:, :width], c[:, :width]) + 2 * _squares(c[:, width:], c[:, width:]))
        if da is not None:
            da[:, rows].addmm_(a[:, rows.start :], c.T, alpha=4)
            da[:, rows.stop :].addmm_(a[:, rows], c[:, width:], alpha=4)

    under_way = start(*panels[0])
    for at_hand, following in zip(panels, [*panels[1:], None]):
        c, work = under_way
        if following is not None:
            under_way = start(*following)
        finish(*at_hand, c, work)
    return value, grads
