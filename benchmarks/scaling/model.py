# SPDX-License-Identifier: Apache-2.0
"""How long a loss over R ranks takes and what memory it needs: arithmetic, transfers, and which hide behind which.

A forward or a backward is a trip (traffic.Trip) with work: among the own rows, and with each rank's rows that are met.
docs/scaling.md derives what is added up here from `sslkernels/distributed/_trips.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from benchmarks.scaling.traffic import TRIPS, Trip, reduction
from sslkernels.distributed._product import PANEL_BYTES, PANELS


@dataclass(frozen=True)
class Link:
    latency: float  # seconds
    bandwidth: float  # bytes a second that a rank sends, while it receives as many

    def seconds(self, sent: float) -> float:
        return self.latency + sent / self.bandwidth


class Machine(Protocol):
    @property
    def overlap(self) -> float: ...  # share of a transfer that can be under way beside arithmetic

    @property
    def visit(self) -> float: ...  # seconds of the host for a block, beside its arithmetic

    def flops(self, part: str) -> float: ...  # a second, "forward" or "backward"

    def seconds(self, kind: str, sent: float, world: int) -> float: ...  # kind: swap, gather, scatter, exchange or sum


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. Ranks are numbered node by node.

    A collective uses all network cards of a node at once, as NCCL's rings do. A ring of swaps crosses from node to
    node on one card, whose speed is that of every hop, as no rank can be ahead of the others.
    """

    peak: float = 989e12
    achieved: float = 0.4
    inner: Link = Link(15e-6, 450e9)
    outer: Link = Link(20e-6, 50e9)
    node: int = 8
    step: float = 2e-6  # seconds of one message of a collective that is under way
    overlap: float = 1.0
    visit: float = 50e-6

    def flops(self, part: str) -> float:
        return self.peak * self.achieved

    def seconds(self, kind: str, sent: float, world: int) -> float:
        messages = {"swap": 0.0, "sum": 2 * math.log2(world)}.get(kind, world - 1.0)  # a sum has a tree
        if world <= self.node:
            return self.inner.seconds(sent) + self.step * messages
        if kind == "swap":
            return self.outer.seconds(sent)
        beyond = sent * (world - self.node) / (world - 1)  # for other nodes
        cards = 1 if kind == "exchange" else self.node  # what all need crosses once a node
        across = beyond / (cards * self.outer.bandwidth)
        return self.outer.latency + self.step * messages + max(sent / self.inner.bandwidth, across)


@dataclass(frozen=True)
class Measured:
    """Processes of this machine."""

    links: dict[str, Link]
    rates: dict[str, float]
    overlap: float = 0.0
    visit: float = 0.0

    def flops(self, part: str) -> float:
        return self.rates[part]

    def seconds(self, kind: str, sent: float, world: int) -> float:
        return self.links[kind].seconds(sent)


@dataclass(frozen=True)
class Half:
    """Forward or backward on each rank: `rows` that travel, the products of a block of them with as many keys.

    local: products among the own rows, of which a symmetric loss computes half. emits: a trip that brings sums home
    although it is a forward one.
    """

    part: str
    trip: Trip
    rows: int
    D: int
    products: float
    local: float

    def work(self, products: float, machine: Machine) -> float:
        return 2 * products * self.rows**2 * self.D / machine.flops(self.part)

    def arithmetic(self, machine: Machine, world: int) -> float:
        """What is left if nothing had to be sent."""
        return self.work(self.local, machine) + self._blocks(world) * self.work(self.products, machine)

    def _blocks(self, world: int) -> float:
        return (world - 1) / 2 if self.trip.half else world - 1

    def seconds(self, machine: Machine, strategy: str, world: int) -> float:
        alone = self.work(self.local, machine)
        if world == 1:
            return alone
        sums = machine.seconds("sum", reduction(self.trip.reduced, world), world) if self.trip.reduced else 0.0
        if not self.trip.cargo:  # the sum of a product's panels, beside the next one
            return beside(alone, sums, machine.overlap)
        return sums + (self._gather(machine, world) if strategy == "gather" else self._ring(machine, strategy, world))

    def _gather(self, machine: Machine, world: int) -> float:
        trip, others = self.trip, (world - 1) * self.rows
        local = self.work(self.local, machine) + machine.visit
        met = (
            self._blocks(world) * self.work(self.products, machine) + 2 * machine.visit
        )  # below and above the own rows
        out = machine.seconds("gather", others * (trip.cargo - trip.kept), world)
        way = "scatter" if trip.summed else "exchange"
        home = machine.seconds(way, others * trip.found, world) if trip.found else 0.0
        if trip.kept:
            return out + met + beside(local, home, machine.overlap)
        return beside(local, out, machine.overlap) + met + home

    def _ring(self, machine: Machine, strategy: str, world: int) -> float:
        trip, hops = self.trip, self.trip.hops(world)
        rounds = -(-hops // 2) if strategy == "bidirectional_ring" and not trip.half else hops
        visited = self._blocks(world) / rounds
        block = visited * self.work(self.products, machine) + -(-hops // rounds) * machine.visit
        out, found, both = (
            machine.seconds("swap", self.rows * size, world) if size else 0.0
            for size in (trip.cargo, trip.found, trip.cargo + trip.found)
        )
        spent = beside(self.work(self.local, machine) + machine.visit, out, machine.overlap)
        for hop in range(1, rounds + 1):  # the next cargo, and what was found one hop before, are under way
            moving = (both if hop > 1 else out) if hop < rounds else (found if hop > 1 else 0.0)
            spent += beside(block, moving, machine.overlap)
        return spent + found

    def memory(self, strategy: str, world: int) -> float:
        """Bytes beyond inputs and gradients that are there for what is met: cargo, what is found for it, its way."""
        if not self.trip.cargo:
            return min(self.trip.reduced, 2 * max(PANEL_BYTES, self.trip.reduced // PANELS))
        if strategy == "gather":
            return world * self.rows * (self.trip.cargo + 2 * self.trip.found)
        return self.rows * (2 * self.trip.cargo + 3 * self.trip.found)


def beside(work: float, transfer: float, overlap: float) -> float:
    """Two things at once, of which a share can be hidden behind the longer."""
    return max(work, transfer) + (1 - overlap) * min(work, transfer)


@dataclass(frozen=True)
class Estimate:
    seconds: float
    arithmetic: float
    sent: float
    memory: float


def estimate(halves: list[Half], machine: Machine, strategy: str, world: int) -> Estimate:
    counts = [halves[0].rows] * world
    return Estimate(
        seconds=sum(half.seconds(machine, strategy, world) for half in halves),
        arithmetic=sum(half.arithmetic(machine, world) for half in halves),
        sent=sum(half.trip.sent(counts, 0, strategy) for half in halves) if world > 1 else 0,
        memory=max(half.memory(strategy, world) for half in halves),
    )


def halves(loss: str, n: int, D: int, size: int, world: int) -> list[Half]:
    """Products of a block: one in a forward; in a backward the scores again and two gradients. SigLIP does all in the
    forward, Barlow Twins two Grams and two gradients, or by columns, D of them, one product and two gradients.
    """
    trips, views = TRIPS[loss]
    made = []
    for part, trip in zip(("forward", "backward"), trips(n * world, D, size, max(4, size), True)):
        products = 3.0 if part == "backward" or trip.summed else 1.0
        if loss == "barlow_twins_loss":
            products = 4.0
        local = products / 2 if trip.half else products
        if not trip.cargo:
            products, local = 0.0, 3.0 * D / n if trip.reduced > D * D else 0.0
        if trip.cargo or trip.reduced:
            made.append(Half(part, trip, views * n, D, products, local))
    return made
