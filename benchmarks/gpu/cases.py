# SPDX-License-Identifier: Apache-2.0
"""The cases of `benchmarks/cases` at sizes that fill a GPU, in bfloat16, with the goals of an H100."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from benchmarks.case import LIMIT, Case, Contender, Goal, faster, memory, within
from benchmarks.cases import contrastive, correlation, distillation, ema, patches, tokens
from benchmarks.contenders import contrastive as contrastive_forms
from benchmarks.contenders import correlation as correlation_forms
from benchmarks.contenders import distillation as distillation_forms
from benchmarks.contenders import distillation_codes as codes_forms
from benchmarks.contenders import ema as ema_forms
from benchmarks.contenders import gpu as peers
from benchmarks.contenders import patches as patches_forms
from benchmarks.contenders import tokens as tokens_forms
from benchmarks.formulas import patches as patches_formulas
from benchmarks.formulas import tokens as tokens_formulas
from benchmarks.stats import OURS

BF16 = 2  # bytes
THEIRS = 5e-2  # relative error up to which another contender is timed
CHECKED = {"N": 512, "B": 8, "V": 4096, "K": 64, "D": 256, "blocks": 1}  # sizes at which a contender is judged


@dataclass(frozen=True)
class GpuCase:
    """`flops` and `bytes` are the floor: at the measured rate of a bfloat16 product, at the bandwidth of a copy.

    `wide` names the inputs that stay float32. `host` limits the microseconds the processor needs to issue one op.
    `most` limits ours in MiB beyond inputs and gradients.
    """

    case: Case
    dtype: torch.dtype = torch.bfloat16
    wide: tuple[str, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    host: float | None = None
    most: float | None = None

    @property
    def name(self) -> str:
        return self.case.name

    def checked(self) -> Case:
        """Small enough for the formula in float64."""
        return self.case.sized(**{k: min(v, CHECKED[k]) for k, v in self.case.shape.items() if k in CHECKED})


def loose(*forms: Contender) -> tuple[Contender, ...]:
    """Judged as 16 bits allow; logits that are rounded to them cost the others more (open_clip's gradients 2.3e-2)."""
    return tuple(replace(form, limit=peers.ROUNDED if form.name == OURS else THEIRS) for form in forms)


def exact(gpu: GpuCase) -> GpuCase:
    """A float32 case is judged by the limits of its contenders."""
    forms = tuple(replace(form, limit=LIMIT) for form in gpu.case.contenders)
    return replace(gpu, case=replace(gpu.case, contenders=forms))


def sized(case: Case, forms: tuple[Contender, ...], *goals: Goal) -> Case:
    have = {form.name for form in forms}
    eager = tuple(name for name in case.eager if name in have)
    return replace(case, contenders=loose(*forms), goals=goals, floor=None, eager=eager, images_per_row=0)


def by_name(forms: tuple[Contender, ...], *names: str) -> tuple[Contender, ...]:
    return tuple(form for form in forms if form.name in names)


def clip(N: int, D: int, *goals: Goal, most: float | None = None) -> GpuCase:
    forms = (*by_name(contrastive_forms.CLIP, "sslkernels", "open_clip"), peers.MEMEFF, peers.INF_CL)
    case = sized(contrastive.clip(N, D), forms, *goals)
    return GpuCase(case, wide=("logit_scale",), flops=4 * 2 * N * N * D, most=most)


def siglip(N: int, D: int, *goals: Goal) -> GpuCase:
    forms = (*by_name(contrastive_forms.SIGLIP, "sslkernels", "open_clip", "open_clip-chunked"), peers.SIGLIP_KERNEL)
    case = sized(contrastive.siglip(N, D), forms, *goals)
    return GpuCase(case, wide=("logit_scale", "logit_bias"), flops=3 * 2 * N * N * D)


def nt_xent(N: int, D: int, *goals: Goal, host: float | None = None) -> GpuCase:
    """The three products of the whole matrix, though half of its tiles would do."""
    forms = contrastive_forms.NT_XENT
    lean = by_name(forms, "lean")[0]
    return GpuCase(
        sized(contrastive.nt_xent(N, D), (*forms, lean.compiled()), *goals), flops=3 * 2 * (2 * N) ** 2 * D, host=host
    )


def barlow(N: int, D: int, *goals: Goal) -> GpuCase:
    case = sized(correlation.barlow(N, D, correlation_forms.BARLOW_WIDE), correlation_forms.BARLOW_WIDE, *goals)
    # in the space of the batch two Grams, and one product by each; in that of the features one product and two more
    return GpuCase(case, flops=4 * 2 * N * N * D if N <= D // 2 else 3 * 2 * N * D * D)


def dino_head(B: int, V: int, D: int, *goals: Goal) -> GpuCase:
    case = next(case for case in distillation.CASES if case.name == "linear_dino")
    forms = by_name(distillation_forms.LINEAR, "sslkernels", "matmul+sslkernels", "dino")
    rows = distillation.CROPS * B
    case = sized(replace(case, shape={"B": B, "V": V, "D": D}), forms, *goals)
    return GpuCase(case, wide=("center",), flops=2 * V * D * (3 * rows + 2 * B))


def sinkhorn(B: int, K: int, *goals: Goal) -> GpuCase:
    case = next(case for case in distillation.CASES if case.name == "sinkhorn_knopp")
    forms = by_name(codes_forms.SINKHORN, "sslkernels", "dinov2", "lightly", "lean")
    case = sized(replace(case, name=f"sinkhorn_knopp-{B}-{K}", shape={"B": B, "K": K}), forms, *goals)
    return exact(GpuCase(case, torch.float32, bytes=2 * 4 * B * K))


def gather(B: int, pixels: int, *goals: Goal) -> GpuCase:
    case = Case(
        f"gather_patches-{B}-{pixels}", "gather_patches", {"B": B, "pixels": pixels}, patches.gather_inputs,
        loose(*patches_forms.GATHER), eager=("lightly",), formula=patches_formulas.gather_patches, goals=goals,
        fresh=True,
    )  # fmt: skip
    return GpuCase(case, bytes=sum(patches.gather_bytes(B, pixels).values()) * BF16 / 4)


def average(D: int, blocks: int, *goals: Goal) -> GpuCase:
    forms = (*by_name(ema_forms.FLOAT32, "sslkernels", "lightly", "lean"), peers.APEX)
    case = next(case for case in ema.CASES if case.name == "ema_update-float32")
    case = sized(replace(case, shape={"D": D, "blocks": blocks}, memory=False), forms, *goals)
    count = sum(math.prod(shape) for shape in ema.vit(D, blocks))
    return exact(GpuCase(case, torch.float32, bytes=3 * 4 * count))


def vocabulary(N: int, D: int, V: int, *goals: Goal) -> GpuCase:
    forms = (*by_name(tokens_forms.CAUSAL, "sslkernels", "transformers", "torch-512"), peers.LIGER)
    case = Case(
        f"linear_cross_entropy-{N}-{V}", "linear_cross_entropy", {"N": N, "D": D, "V": V}, tokens.causal_inputs,
        loose(*forms), eager=("transformers",), formula=tokens_formulas.linear_cross_entropy, goals=goals,
    )  # fmt: skip
    return GpuCase(case, flops=3 * 2 * N * D * V)


CASES = (
    clip(32_768, 512, within("gemm", 1.7), faster("memeff", 2.0), most=1024),
    clip(65_536, 1024, faster("memeff", 1.5), most=1024),
    nt_xent(8192, 128, faster("eager", 5.0), faster("lean+compile", 3.0)),
    nt_xent(256, 128, faster("eager", 1.0), faster("lean+compile", 1.0), host=80),
    nt_xent(1024, 128, faster("eager", 1.0), faster("lean+compile", 1.0), host=80),
    siglip(32_768, 768, within("gemm", 1.7), faster("eager", 2.0)),
    barlow(256, 8192, faster("eager", 10.0), faster("lean", 1.2)),
    barlow(2048, 8192, faster("eager", 2.5), faster("lean", 1.2)),
    dino_head(64, 65_536, 256, faster("eager", 3.0), memory("eager", 0.125)),
    sinkhorn(256, 65_536, faster("eager", 4.0), within("copy", 1.5)),
    sinkhorn(65_536, 256, faster("eager", 4.0), within("copy", 1.5)),
    gather(256, 224, within("copy", 1.2)),
    average(1024, 24, within("copy", 1 / 0.9), faster("lean", 1.3)),
    vocabulary(8192, 1024, 32_000, faster("liger", 1.0), memory("liger", 1.0)),
)
