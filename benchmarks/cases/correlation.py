# SPDX-License-Identifier: Apache-2.0
"""The redundancy-reduction cases: two projected views, and the statistics of their batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import COTANGENT, Case, Contender, Goal, Inputs, faster, memory
from benchmarks.cases.contrastive import two_views
from benchmarks.contenders import correlation as contenders
from benchmarks.floors import Gemms, Grams
from benchmarks.formulas import correlation as formulas


def view_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    """Projections: random rows and a noisy copy of each, with a mean and a scale of their own in every column."""
    mean, scale = torch.randn(D, generator=generator), 0.5 + torch.rand(D, generator=generator)
    z_a, z_b = ((mean + scale * z.detach()).requires_grad_() for z in two_views(generator, N, D))
    return {"z_a": z_a, "z_b": z_b}


def barlow_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    return {**view_inputs(generator, N, D), "lambda_param": 5e-3}


def tico_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    """After some steps: the second moment of other rows."""
    rows = F.normalize(torch.randn(4 * D, D, generator=generator), dim=1)
    return {**view_inputs(generator, N, D), "covariance": rows.t() @ rows / len(rows), "beta": 0.9, "rho": 8.0}


def standard_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    return {"x": view_inputs(generator, N, D)["z_a"], COTANGENT: torch.randn(N, D, generator=generator)}


def views(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["z_a"].detach(), inputs["z_b"].detach()


def columns(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["z_a"].detach().t(), inputs["z_b"].detach().t()


def barlow(N: int, D: int, forms: tuple[Contender, ...], *goals: Goal) -> Case:
    """While N <= D / 2 the products are those of the batch, beyond those of the features."""
    have = {contender.name for contender in forms}
    return Case(
        f"barlow_twins-{N}-{D}", "barlow_twins_loss", {"N": N, "D": D}, barlow_inputs, forms,
        eager=tuple(name for name in ("barlowtwins", "lightly", "solo-learn") if name in have),
        formula=formulas.barlow_twins, floor=Grams(views) if N <= D // 2 else Gemms(columns, 3), images_per_row=2,
        goals=goals, slow=D >= 2048,
    )  # fmt: skip


def vicreg(N: int, D: int, *goals: Goal) -> Case:
    return Case(
        f"vicreg-{N}-{D}", "vicreg_loss", {"N": N, "D": D}, view_inputs, contenders.VICREG,
        eager=("vicreg", "lightly"), formula=formulas.vicreg, floor=Grams(views), images_per_row=2, goals=goals,
        slow=True,
    )  # fmt: skip


def theirs(at_least: float, lean: float, share: float) -> tuple[Goal, ...]:
    return faster("barlowtwins", at_least), faster("lean", lean), memory("barlowtwins", share)


CASES = (
    barlow(256, 512, contenders.BARLOW),
    barlow(256, 8192, contenders.BARLOW_COMPILED, *theirs(18, 1.6, 0.05)),
    barlow(1024, 8192, contenders.BARLOW_WIDE, *theirs(5, 1.1, 0.10)),
    barlow(2048, 4096, contenders.BARLOW_WIDE, *theirs(1.9, 1.0, 0.25)),
    barlow(2048, 2048, contenders.BARLOW_FEATURES, faster("eager", 0.95), memory("eager", 0.50)),
    vicreg(256, 8192, faster("vicreg", 20), faster("lightly", 30), faster("lean", 1.1)),
    vicreg(1024, 4096, faster("vicreg", 6), faster("lightly", 10), faster("lean", 1.1)),
    Case(
        "tico-2048-256", "tico_loss", {"N": 2048, "D": 256}, tico_inputs, contenders.TICO,
        eager=("lightly",), formula=formulas.tico, images_per_row=2,
    ),
    Case(
        "frossl-256-2048", "frossl_loss", {"N": 256, "D": 2048}, view_inputs, contenders.FROSSL,
        eager=("lightly",), formula=formulas.frossl, floor=Grams(views), images_per_row=2,
    ),
    Case(
        "standardize-1024-8192", "standardize", {"N": 1024, "D": 8192}, standard_inputs, contenders.STANDARD,
        eager=("torch",), formula=formulas.standardize,
    ),
)  # fmt: skip
