# SPDX-License-Identifier: Apache-2.0
"""Clusters of GPUs that nobody here has: what the model says of them, from published constants."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.report import table
from benchmarks.scaling.measure import Shape
from benchmarks.scaling.model import Cluster, Estimate, estimate, halves
from sslkernels.distributed import STRATEGIES as ALL

STRATEGIES = ALL
GPUS = (8, 64, 1024)
SHAPES = (
    Shape("nt_xent", 512, 128),
    Shape("clip_loss", 1024, 1024),
    Shape("clip_loss", 8192, 1024),
    Shape("siglip_loss", 1024, 1024),
    Shape("barlow_twins_loss", 32, 8192),
)
BFLOAT16 = 2  # bytes


class Constant(NamedTuple):
    what: str
    value: str
    source: str
    measured: str = "not measured yet"


def constants(cluster: Cluster) -> list[Constant]:
    """What the predictions stand on; replace them with what you measure."""
    return [
        Constant("dense bfloat16 products", f"{cluster.peak / 1e12:.0f} TFLOP/s", "NVIDIA, H100 SXM data sheet"),
        Constant("share of it that the sweeps reach", f"{cluster.achieved:.0%}", "assumed, as in docs/gpu.md"),
        Constant(
            "NVLink, each way", f"{cluster.inner.bandwidth / 1e9:.0f} GB/s", "the same: 900 both ways"
        ),
        Constant(
            "network card of each GPU, each way", f"{cluster.outer.bandwidth / 1e9:.0f} GB/s",
            "NVIDIA, DGX H100 data sheet: ConnectX-7, 400 Gb/s",
        ),
        Constant(
            "start of a transfer within a node, between nodes",
            f"{cluster.inner.latency * 1e6:.0f}, {cluster.outer.latency * 1e6:.0f} us", "assumed: NCCL's 10-20 us",
        ),
        Constant("message of a collective under way", f"{cluster.step * 1e6:.0f} us", "assumed"),
        Constant("host, for the launches of a block", f"{cluster.visit * 1e6:.0f} us", "assumed; the goal is 80"),
        Constant("GPUs of a node", f"{cluster.node}", "DGX H100"),
    ]  # fmt: skip


def constants_table() -> str:
    return table(["constant", "value", "source", "measured here"], [list(row) for row in constants(Cluster())], right=4)


def predicted(shape: Shape, world: int, cluster: Cluster | None = None) -> dict[str, Estimate]:
    """By strategy; batches of one size, compared once, nothing compiled."""
    work = halves(shape.loss, shape.n, shape.D, BFLOAT16, world)
    return {strategy: estimate(work, cluster or Cluster(), strategy, world) for strategy in STRATEGIES}


def hidden_from(loss: str, D: int, world: int, cluster: Cluster | None = None) -> int:
    """The fewest rows of a rank, in powers of two, with which a ring takes at most 1.1 times the time of a gather."""
    for n in (2**i for i in range(4, 21)):
        found = predicted(Shape(loss, n, D), world, cluster)
        if found["ring"].seconds <= 1.1 * found["gather"].seconds:
            return n
    return 0
