# SPDX-License-Identifier: Apache-2.0
"""The bytes a rank sends in a step, by formula: docs/scaling.md says where each term comes from.

R ranks, rank r with n_r rows of D features of `size` bytes; what is summed has `wide` bytes (4, of float64 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trip:
    """Keys that meet the rows of all ranks. Bytes of one row: `cargo` goes out, `found` comes home.

    half: each pair of ranks meets once. summed: what is found are sums, which a collective can add on the way; log-sum-
    exps are merged by who they are for. kept: of the cargo, what "gather" need not bring again in backward.
    reduced: bytes, of no row, that are summed over all ranks.
    """

    cargo: int
    found: int
    half: bool
    summed: bool
    kept: int = 0
    reduced: int = 0

    def hops(self, world: int) -> int:
        return world // 2 if self.half else world - 1

    def sent(self, counts: Sequence[int], rank: int, strategy: str) -> float:
        return self._travelling(counts, rank, strategy) + reduction(self.reduced, len(counts))

    def _travelling(self, counts: Sequence[int], rank: int, strategy: str) -> int:
        world, own = len(counts), counts[rank]
        if strategy == "gather":  # padded to the longest where a collective wants one size
            out = (world - 1) * max(counts) * (self.cargo - self.kept)
            home = (world - 1) * max(counts) if self.summed else sum(counts) - own
            return out + home * self.found
        hops = self.hops(world)
        back = hops // 2 if strategy == "bidirectional_ring" and not self.half else 0
        sent = 0
        for way, count in ((1, hops - back), (-1, back)):
            held = [counts[(rank + way * hop) % world] for hop in range(count + 1)]
            sent += sum(held[:-1]) * self.cargo + sum(held[1:]) * self.found
        return sent


def reduction(size: int, world: int) -> float:
    """Bytes that a rank sends so that all have the sum of so many bytes: each is scattered, and gathered."""
    return 2 * (world - 1) / world * size


def _softmax(D: int, size: int, wide: int, kept: bool, half: bool) -> tuple[Trip, Trip]:
    """Out go the keys, home comes a log-sum-exp; out go keys, their log-sum-exp and its gradient, home the keys'."""
    forward = Trip(D * size, wide, half, summed=False)
    return forward, Trip(D * size + 2 * wide, D * wide, half, summed=True, kept=D * size * kept)


def nt_xent(N: int, D: int, size: int, wide: int, kept: bool) -> tuple[Trip, Trip]:
    return _softmax(D, size, wide, kept, half=True)


def clip_loss(N: int, D: int, size: int, wide: int, kept: bool) -> tuple[Trip, Trip]:
    return _softmax(D, size, wide, kept, half=False)


def siglip_loss(N: int, D: int, size: int, wide: int, kept: bool) -> tuple[Trip, Trip]:
    """No normaliser: the texts' gradients come home in the forward."""
    return Trip(D * size, D * wide, half=False, summed=True), NOTHING


def barlow_twins_loss(N: int, D: int, size: int, wide: int, kept: bool) -> tuple[Trip, Trip]:
    """Both views travel and nothing comes home, or the D x D product is summed; means, squares, products and shares of
    columns are float64. In backward the ranks sum what arrives at the loss."""
    columns, upstream = 8 * 9 * D, Trip(0, 0, half=False, summed=True, reduced=wide)
    if N <= D // 2:
        return Trip(2 * D * size, 0, half=False, summed=True, reduced=columns + 8), upstream
    return Trip(0, 0, half=False, summed=True, reduced=columns + D * D * wide), upstream


NOTHING = Trip(0, 0, half=False, summed=True)
# By loss: its trips for N samples of all ranks, and how many rows of a sample travel.
TRIPS: dict[str, tuple[Callable[..., tuple[Trip, Trip]], int]] = {
    "nt_xent": (nt_xent, 2),
    "clip_loss": (clip_loss, 1),
    "siglip_loss": (siglip_loss, 1),
    "barlow_twins_loss": (barlow_twins_loss, 1),
}


def sent(
    loss: str, samples: Sequence[int], rank: int, strategy: str, D: int, size: int = 4, *, kept: bool = True
) -> tuple[float, float]:
    """Bytes that a rank sends in forward and in backward. kept: not where the step is compiled for uneven batches."""
    trips, views = TRIPS[loss]
    counts = [views * n for n in samples]
    forward, backward = trips(sum(samples), D, size, max(4, size), kept)
    return forward.sent(counts, rank, strategy), backward.sent(counts, rank, strategy)
