# SPDX-License-Identifier: Apache-2.0
"""The self-distillation cases: 2 views of a teacher, 10 of a student, at the sizes of the papers' heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Contender, Inputs, faster, memory, within
from benchmarks.contenders import distillation as contenders
from benchmarks.contenders import distillation_codes as codes
from benchmarks.floors import Copy, Gemms
from benchmarks.formulas import distillation as formulas

CROPS = 10  # of DINO: 2 large, 8 small
SWAV_CROPS = 8
TOKENS = 14  # of a side of an image, for iBOT
SOFT = {"tau_s": 0.1, "tau_t": 0.04, "momentum": 0.9}
SINKHORN = {"iterations": 3, "epsilon": 0.05}
FLOAT = 4  # bytes


def cosines(generator: torch.Generator, *shape: int) -> Tensor:
    """Logits of a head whose rows and prototypes have norm 1."""
    return (0.2 * torch.randn(shape, generator=generator)).clamp_(-1, 1)


def dino_inputs(generator: torch.Generator, B: int, V: int) -> Inputs:
    """The crops of all samples, one crop after the other; teacher and student agree somewhat."""
    teacher = cosines(generator, 2, B, V)
    student = (0.5 * teacher.mean(0) + cosines(generator, CROPS, B, V)).flatten(0, 1)
    return {
        "student": student.requires_grad_(), "teacher": teacher.flatten(0, 1), "center": cosines(generator, V) / 10,
        "crops": CROPS, **SOFT,
    }  # fmt: skip


def dino_bytes(B: int, V: int) -> dict[str, int]:
    student, teacher = FLOAT * CROPS * B * V, FLOAT * 2 * B * V
    return {"read student": student, "read teacher": teacher, "write gradient": student}


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=generator), dim=-1)


def frozen_inputs(generator: torch.Generator, B: int, V: int, D: int) -> Inputs:
    """Rows of norm 1 and prototypes of norm 1, as DINO's head has them; the teacher's are near the student's. As in the
    first epoch the prototypes have no gradient."""
    weight = unit(generator, V, D)
    teacher_weight = F.normalize(weight + 0.1 * unit(generator, V, D), dim=1)
    return {
        "student": unit(generator, CROPS * B, D).requires_grad_(), "weight": weight,
        "teacher": unit(generator, 2 * B, D), "teacher_weight": teacher_weight,
        "center": cosines(generator, V) / 10, "crops": CROPS, **SOFT,
    }  # fmt: skip


def trainable_inputs(generator: torch.Generator, B: int, V: int, D: int) -> Inputs:
    inputs = frozen_inputs(generator, B, V, D)
    return {**inputs, "weight": inputs["weight"].requires_grad_()}


def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["student"].detach(), inputs["weight"].detach()


def patch_inputs(generator: torch.Generator, M: int, V: int) -> Inputs:
    """M masked tokens among those of M / 32 images, an image in two without any."""
    images, tokens = max(2, M // 32), TOKENS**2
    chosen = torch.randperm(images * tokens // 2, generator=generator)[:M]
    mask = torch.zeros(images * tokens, dtype=torch.bool)
    mask[chosen] = True
    return {
        "student": cosines(generator, M, V).requires_grad_(), "teacher": cosines(generator, M, V),
        "center": cosines(generator, V) / 10, "mask": mask.view(images, TOKENS, TOKENS), **SOFT,
    }  # fmt: skip


def patch_bytes(M: int, V: int) -> dict[str, int]:
    rows = FLOAT * M * V
    return {"read student": rows, "read teacher": rows, "write gradient": rows}


def sinkhorn_inputs(generator: torch.Generator, B: int, K: int) -> Inputs:
    return {"scores": cosines(generator, B, K), **SINKHORN}


def sinkhorn_bytes(B: int, K: int) -> dict[str, int]:
    """The scores once: who reads them again for every sum of an iteration may find them in a cache."""
    return {"read scores": FLOAT * B * K, "write codes": FLOAT * B * K}


def swav_inputs(generator: torch.Generator, B: int, K: int) -> Inputs:
    scores = cosines(generator, SWAV_CROPS * B, K).requires_grad_()
    return {"scores": scores, "crops": SWAV_CROPS, "tau": 0.1, **SINKHORN}


def dino(B: int, forms: tuple[Contender, ...]) -> Case:
    return Case(
        f"dino-{B}", "soft_cross_entropy", {"B": B, "V": 65536}, dino_inputs, forms,
        eager=("dino", "lightly"), formula=formulas.dino, floor=Copy(dino_bytes), variant="DINO, 2 x 10 views",
        goals=(faster("dino", 9), faster("lightly", 7), faster("lean", 4), within("copy", 1.9)),
    )  # fmt: skip


LINEAR = {"B": 64, "V": 65536, "D": 256}
FUSED = "matmul+sslkernels"
CASES = (
    dino(32, contenders.DINO),
    dino(64, contenders.DINO_COMPILED),
    Case(
        "linear_dino", "linear_soft_cross_entropy", LINEAR, trainable_inputs, contenders.LINEAR,
        eager=("dino",), formula=formulas.linear_dino, floor=Gemms(logits, 3), variant="DINO, 2 x 10 views",
        slow=True, goals=(within(FUSED, 1.3), memory(FUSED, 0.125)),
    ),
    Case(
        "linear_dino-frozen", "linear_soft_cross_entropy", LINEAR, frozen_inputs, contenders.LINEAR,
        eager=("dino",), formula=formulas.linear_dino, floor=Gemms(logits, 2),
        variant="DINO, 2 x 10 views, frozen prototypes", slow=True, goals=(within(FUSED, 1.0), memory(FUSED, 0.125)),
    ),
    Case(
        "ibot_patches", "ibot_patch_loss", {"M": 1024, "V": 8192}, patch_inputs, contenders.PATCHES,
        eager=("dinov2", "lightly"), formula=formulas.ibot_patches, floor=Copy(patch_bytes),
    ),
    Case(
        "sinkhorn_knopp", "sinkhorn_knopp", {"B": 256, "K": 65536}, sinkhorn_inputs, codes.SINKHORN,
        eager=("dinov2", "lightly"), formula=formulas.sinkhorn_codes, floor=Copy(sinkhorn_bytes),
        goals=(faster("dinov2", 4), faster("lean", 2)), variant="3 iterations",
    ),
    Case(
        "swav", "swav_loss", {"B": 64, "K": 3000}, swav_inputs, codes.SWAV,
        eager=("swav", "lightly"), formula=formulas.swav, variant="2 + 6 crops",
    ),
)  # fmt: skip
