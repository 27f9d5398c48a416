# SPDX-License-Identifier: Apache-2.0
"""How one rank's rows meet every other rank's: `trip` takes them there, and what was found for them comes home.

A trip has cargo, tensors with one leading row a key of this rank. Wherever it comes, `visit(cargo, rows)` computes with
the rank's own rows and may return findings, tensors with one leading row a key, which are folded over all visits and
handed to the keys' owner. `local()` is the work among the own rows, done while the first transfer is under way.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.distributed import _collectives as collectives

Tensors = list[Tensor]
Visit = Callable[[Tensors, slice], Tensors]


class Fold(NamedTuple):
    """How findings of two visits become one; `identity` is what a row without a visit has."""

    merge: Callable[[Tensors, Tensors], Tensors]
    identity: float


SUM = Fold(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], 0.0)
LOGADDEXP = Fold(lambda a, b: [torch.logaddexp(x, y) for x, y in zip(a, b, strict=True)], -torch.inf)


class Route(NamedTuple):
    """Where a trip goes. half: each pair of ranks meets once instead of twice, for what is symmetric."""

    rank: int
    counts: list[int]  # rows of each rank
    group: str
    strategy: str
    half: bool

    @property
    def world(self) -> int:
        return len(self.counts)

    def meets(self, owner: int) -> tuple[slice, slice] | None:
        """Which own rows meet which rows of another rank here; None where that rank sees to it.

        On the half way each rank meets the next world / 2 ones. Two that are opposite each other share the work: the
        lower has the first half of its own rows meet all of the other's, the higher the rest.
        """
        everything = slice(None)
        if not self.half:
            return everything, everything
        ahead = (owner - self.rank) % self.world
        if 2 * ahead < self.world:
            return everything, everything
        if 2 * ahead > self.world:
            return None
        if self.rank < owner:
            return slice(self.counts[self.rank] // 2), everything
        return everything, slice(self.counts[owner] // 2, None)


def trip(
    route: Route, cargo: Tensors, local: Callable[[], Any], visit: Visit, fold: Fold, kept: Tensor | None = None
) -> tuple[Tensors, Tensor | None]:
    """The findings for the own rows from everywhere else, and what "gather" brought of cargo[0], to be `kept`."""
    if route.strategy == "gather":
        return _gather(route, cargo, local, visit, fold, kept)
    return _ring(route, cargo, local, visit, fold), None


def _on_part(route: Route, owner: int, cargo: Tensors, visit: Visit, fold: Fold) -> Tensors:
    """A visit of one owner's rows, or of those that are met here."""
    meeting = route.meets(owner)
    if meeting is None:
        return []
    rows, keys = meeting
    found = visit([x[keys] for x in cargo], rows)
    if keys == slice(None):
        return found
    whole = [x.new_full((route.counts[owner], *x.shape[1:]), fold.identity) for x in found]
    for x, part in zip(whole, found):
        x[keys] = part
    return whole


# gather


def _gather(route, cargo, local, visit, fold, kept):
    started = [collectives.start_gather(x, route.counts, route.group) for x in (cargo if kept is None else cargo[1:])]
    if kept is None:
        local()
    for work, _ in started:
        work.wait()
    everything = ([] if kept is None else [kept]) + [result() for _, result in started]
    found = _visit_ranges(route, everything, visit, fold)
    if kept is not None and fold is SUM and found:
        # the way home of gradients, while those of the own block are computed
        home = [collectives.start_scatter(x, route.counts, route.counts[route.rank], route.group) for x in found]
        local()
        for work, _ in home:
            work.wait()
        return [result() for _, result in home], everything[0]
    if kept is not None:
        local()
    return _send_home(route, found, fold), everything[0]


def _ranges(route) -> list[tuple[int, int]]:
    """Runs of neighbouring owners that are met whole, [first, last): each is one visit."""
    runs: list[tuple[int, int]] = []
    for owner in range(route.world):
        if owner == route.rank or route.meets(owner) != (slice(None), slice(None)):
            continue
        if runs and runs[-1][1] == owner:
            runs[-1] = runs[-1][0], owner + 1
        else:
            runs.append((owner, owner + 1))
    return runs


def _visit_ranges(route, everything, visit, fold) -> Tensors:
    starts = [sum(route.counts[:owner]) for owner in range(route.world + 1)]
    visits = [(starts[a], starts[b], visit([x[starts[a] : starts[b]] for x in everything], slice(None)))
              for a, b in _ranges(route)]  # fmt: skip
    opposite = (route.rank + route.world // 2) % route.world
    if route.half and route.world % 2 == 0:
        span = slice(starts[opposite], starts[opposite + 1])
        found = _on_part(route, opposite, [x[span] for x in everything], visit, fold)
        visits.append((span.start, span.stop, found))
    found = visits[0][2] if visits else []
    whole = [x.new_full((starts[-1], *x.shape[1:]), fold.identity) for x in found]
    for start, end, parts in visits:
        for x, part in zip(whole, parts):
            x[start:end] = part
    return whole


def _send_home(route, found, fold) -> Tensors:
    """Findings for everybody's rows to their owners, who fold them in the order of the ranks."""
    if not found:
        return []
    own = route.counts[route.rank]
    if fold is SUM:
        home = [collectives.start_scatter(x, route.counts, own, route.group) for x in found]
        for work, _ in home:
            work.wait()
        return [result() for _, result in home]
    received = [collectives.all_to_all(x, route.counts, own, route.group) for x in found]
    return reduce(fold.merge, [list(parts) for parts in zip(*(x.split(own) for x in received))])


# ring


def _ring(route, cargo, local, visit, fold) -> Tensors:
    hops = route.world // 2 if route.half else route.world - 1
    both = route.strategy == "bidirectional_ring" and not route.half
    ways = [(1, hops - hops // 2), (-1, hops // 2)] if both else [(1, hops)]
    home: list[Tensors] = []
    tours = [_tour(route, cargo, visit, fold, way, count, home) for way, count in ways if count]
    for tour in tours:
        next(tour)  # the first transfer has started
    local()
    for _ in zip_longest(*tours):
        pass
    home = [found for found in home if found]
    return reduce(fold.merge, home) if home else []


def _tour(route, cargo, visit, fold, way, hops, home) -> Iterator[None]:
    """Hop by hop in one direction; yields where another tour may have its turn. What is found travels one hop behind.

    After hop h this rank holds the rows of the rank h further in `way`: each hands to the one before it.
    """
    rank, world = route.rank, route.world
    to, source = (rank - way) % world, (rank + way) % world
    held, arriving = cargo, None
    arriving = _swap(route, held, to, source, source)
    found: Any = None
    yield
    for hop in range(1, hops + 1):
        owner = (rank + way * hop) % world
        held = arriving.wait()
        if hop < hops:
            arriving = _swap(route, held, to, source, (owner + way) % world)
        new = _on_part(route, owner, held, visit, fold)
        if new:
            new = fold.merge(found.wait(), new) if found else new
            if hop < hops:
                found = _swap(route, new, to, source, (owner + way) % world)
            else:
                found = _swap(route, new, owner, (rank - way * hops) % world, rank)
        yield
    home.append(found.wait() if found else [])


class _Swap(NamedTuple):
    works: list[Any]
    sent: Tensors  # alive until they are gone
    received: Tensors

    def wait(self) -> Tensors:
        for work in self.works:
            work.wait()
        return self.received


def _swap(route: Route, xs: Sequence[Tensor], to: int, source: int, owner: int) -> _Swap:
    """Hand xs to a rank, and take from another what it has of the `owner`'s rows."""
    sent = [x.contiguous() for x in xs]
    received = [x.new_empty(route.counts[owner], *x.shape[1:]) for x in xs]
    return _Swap(collectives.start_swap(sent, received, to, source, route.group), sent, received)
