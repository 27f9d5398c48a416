# SPDX-License-Identifier: Apache-2.0
"""The neighbour cases: search and clustering as evaluations and codebooks use them, and KoLeo."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Goal, Inputs, faster, memory
from benchmarks.contenders import neighbors as contenders
from benchmarks.floors import Gemms
from benchmarks.formulas import neighbors as formulas


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=generator), dim=1)


def search_inputs(generator: torch.Generator, N: int, M: int, D: int, k: int, metric: str = "dot") -> Inputs:
    return {"queries": unit(generator, N, D), "keys": unit(generator, M, D), "k": k, "metric": metric}


def step_inputs(generator: torch.Generator, N: int, M: int, D: int) -> Inputs:
    """Points around centres, which are not quite where the mean of their points is."""
    centres = torch.randn(M, D, generator=generator)
    points = centres[torch.randint(M, (N,), generator=generator)] + 0.5 * torch.randn(N, D, generator=generator)
    return {"queries": points, "keys": centres + 0.1 * torch.randn(M, D, generator=generator)}


def koleo_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    return {"x": torch.randn(N, D, generator=generator).requires_grad_(), "eps": 1e-8}


def knn_inputs(generator: torch.Generator, N: int, M: int, D: int, k: int, classes: int) -> Inputs:
    centres = torch.randn(classes, D, generator=generator)
    truth, labels = (torch.randint(classes, (size,), generator=generator) for size in (N, M))
    queries, keys = (F.normalize(centres[y] + 3 * torch.randn(len(y), D, generator=generator)) for y in (truth, labels))
    return {
        "queries": queries, "keys": keys, "labels": labels, "truth": truth, "classes": classes, "k": k,
        "temperature": 0.07,
    }  # fmt: skip


def uniformity_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    return {"x": unit(generator, N, D), "t": 2.0}


def pair(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["queries"], inputs["keys"]


def rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["x"].detach(), inputs["x"].detach()


def search(N: int, M: int, metric: str, *goals: Goal) -> Case:
    return Case(
        f"topk_similarity-{metric}", "topk_similarity", {"N": N, "M": M, "D": 128, "k": 20},
        partial(search_inputs, metric=metric), contenders.TOP, eager=("faiss", "torch"), holds=formulas.top,
        floor=Gemms(pair, 1), goals=goals, variant=metric, slow=N >= 10_000,
    )  # fmt: skip


def koleo(N: int, D: int, *goals: Goal) -> Case:
    return Case(
        f"koleo-{N}-{D}", "koleo_loss", {"N": N, "D": D}, koleo_inputs, contenders.KOLEO, eager=("lightly", "dinov2"),
        formula=formulas.koleo, floor=Gemms(rows, 1), goals=goals,
    )  # fmt: skip


CASES = (
    search(10_000, 50_000, "dot", faster("faiss", 1.0), faster("torch", 2.0), memory("torch", 0.02)),
    search(1000, 50_000, "l2"),
    Case(
        "nearest", "nearest", {"N": 100_000, "M": 4096, "D": 64}, step_inputs, contenders.NEAREST,
        eager=("faiss", "scikit-learn", "torch"), holds=formulas.nearest, floor=Gemms(pair, 1),
        goals=(faster("torch", 1.5), faster("faiss", 1.0)), variant="a step of k-means", slow=True,
    ),
    koleo(64, 384),
    koleo(4096, 1024, faster("lightly", 1.5)),
    Case(
        "knn", "KNNClassifier", {"N": 1000, "M": 50_000, "D": 128, "k": 20, "classes": 100}, knn_inputs,
        contenders.KNN, eager=("dino",), formula=formulas.knn,
    ),
    Case(
        "uniformity", "uniformity", {"N": 8192, "D": 128}, uniformity_inputs, contenders.UNIFORMITY,
        eager=("align_uniform",), formula=formulas.uniformity,
    ),
)  # fmt: skip
