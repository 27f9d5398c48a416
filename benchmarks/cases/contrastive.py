# SPDX-License-Identifier: Apache-2.0
"""The contrastive cases. float32; a goal without a contender's name is against the fastest form that anyone ships."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Goal, Inputs, faster, memory, within
from benchmarks.contenders import contrastive as contenders
from benchmarks.floors import Gemms
from benchmarks.formulas import contrastive as formulas


def two_views(generator: torch.Generator, N: int, D: int) -> tuple[Tensor, Tensor]:
    """Random rows and a noisy copy of each: positives have a cosine near 0.7."""
    first = torch.randn(N, D, generator=generator)
    second = first + torch.randn(N, D, generator=generator)
    return first.requires_grad_(), second.requires_grad_()


def nt_xent_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    out0, out1 = two_views(generator, N, D)
    return {"out0": out0, "out1": out1, "temperature": 0.1}


def info_nce_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    query, key = two_views(generator, N, D)
    return {"query": query, "key": key, "temperature": 0.1}


def moco_inputs(generator: torch.Generator, N: int, K: int, D: int) -> Inputs:
    query, key = two_views(generator, N, D)
    queue = F.normalize(torch.randn(K, D, generator=generator), dim=1)
    return {"query": query, "key": key.detach(), "queue": queue, "temperature": 0.07}


def clip_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    """Rows of norm 1, as a CLIP model hands them over; the scale is a leaf, as a learnable temperature is."""
    image, text = (F.normalize(x.detach(), dim=1).requires_grad_() for x in two_views(generator, N, D))
    return {"image": image, "text": text, "logit_scale": torch.tensor(1 / 0.07, requires_grad=True)}


def siglip_inputs(generator: torch.Generator, N: int, D: int) -> Inputs:
    image, text = (F.normalize(x.detach(), dim=1).requires_grad_() for x in two_views(generator, N, D))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    return {"image": image, "text": text, "logit_scale": scale, "logit_bias": bias}


def supcon_inputs(generator: torch.Generator, N: int, D: int, classes: int) -> Inputs:
    labels = torch.randint(classes, (N,), generator=generator)
    centres = torch.randn(classes, D, generator=generator)
    features = centres[labels] + torch.randn(N, D, generator=generator)
    return {"features": features.requires_grad_(), "labels": labels, "temperature": 0.1}


def stacked(inputs: Inputs) -> tuple[Tensor, Tensor]:
    z = F.normalize(torch.cat([inputs["out0"], inputs["out1"]]), dim=1).detach()
    return z, z


def pair(first: str, second: str):
    return lambda inputs: (inputs[first].detach(), inputs[second].detach())


def nt_xent(N: int, D: int, *goals: Goal) -> Case:
    return Case(
        f"nt_xent-{N}-{D}", "nt_xent", {"N": N, "D": D}, nt_xent_inputs, contenders.NT_XENT,
        eager=("lightly", "solo-learn"), formula=formulas.nt_xent, floor=Gemms(stacked, 3), images_per_row=2,
        goals=goals,
    )  # fmt: skip


def info_nce(N: int, D: int, *goals: Goal) -> Case:
    return Case(
        f"info_nce-{N}-{D}", "info_nce", {"N": N, "D": D}, info_nce_inputs, contenders.INFO_NCE,
        eager=("info-nce",), formula=formulas.info_nce, floor=Gemms(pair("query", "key"), 3), images_per_row=2,
        goals=goals,
    )  # fmt: skip


def clip(N: int, D: int, *goals: Goal) -> Case:
    return Case(
        f"clip-{N}-{D}", "clip_loss", {"N": N, "D": D}, clip_inputs, contenders.CLIP,
        eager=("open_clip",), formula=formulas.clip, floor=Gemms(pair("image", "text"), 3), images_per_row=2,
        goals=goals,
    )  # fmt: skip


def siglip(N: int, D: int, *goals: Goal) -> Case:
    return Case(
        f"siglip-{N}-{D}", "siglip_loss", {"N": N, "D": D}, siglip_inputs, contenders.SIGLIP,
        eager=("open_clip", "open_clip-chunked"), formula=formulas.siglip, floor=Gemms(pair("image", "text"), 3),
        images_per_row=2, goals=goals,
    )  # fmt: skip


def moco(N: int, K: int, D: int, *goals: Goal) -> Case:
    # The key encoder runs forward only, a third of a training pass.
    return Case(
        f"moco-{N}-{K}-{D}", "info_nce", {"N": N, "K": K, "D": D}, moco_inputs, contenders.MOCO,
        eager=("moco", "info-nce"), formula=formulas.moco, floor=Gemms(pair("query", "queue"), 2),
        images_per_row=4 / 3, goals=goals,
    )  # fmt: skip


def supcon(N: int, D: int, classes: int, *goals: Goal) -> Case:
    return Case(
        f"supcon-{N}-{D}-{classes}", "supcon", {"N": N, "D": D, "classes": classes}, supcon_inputs, contenders.SUPCON,
        eager=("pytorch-metric-learning", "SupContrast"), formula=formulas.supcon,
        floor=Gemms(pair("features", "features"), 3), images_per_row=1, goals=goals,
    )  # fmt: skip


CASES = (
    nt_xent(32, 128, faster("eager", 0.9)),
    nt_xent(256, 128, faster("eager", 2.0)),
    nt_xent(512, 128),
    nt_xent(1024, 128),
    nt_xent(2048, 128, faster("lightly", 6.0), faster("lean", 2.3), within("gemm", 0.8), memory("lightly", 0.03)),
    nt_xent(4096, 128, faster("lightly", 6.0), faster("lean", 2.2), memory("lightly", 0.02)),
    nt_xent(2048, 512, faster("lightly", 2.6), faster("lean", 1.5), memory("lightly", 0.10)),
    info_nce(4096, 128, within("gemm", 1.15), memory("eager", 0.05)),
    clip(4096, 128, faster("open_clip", 4.0), memory("open_clip", 0.03)),
    clip(4096, 512, faster("open_clip", 2.0), memory("open_clip", 0.08)),
    siglip(4096, 128, faster("open_clip", 4.0), memory("open_clip", 0.03)),
    siglip(4096, 512, faster("open_clip", 2.0), memory("open_clip", 0.08)),
    moco(256, 65536, 128, faster("eager", 2.5), memory("eager", 0.10)),
    supcon(4096, 128, 100, faster("eager", 4.0), memory("eager", 0.03)),
)
