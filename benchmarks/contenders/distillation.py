# SPDX-License-Identifier: Apache-2.0
"""Contenders for self-distillation: what named peers ship, restated, and our algebra in plain PyTorch.

Every form of DINO's and iBOT's loss returns the teacher's next centre too, from this batch's mean. Teachers' outputs
carry no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS

Pair = tuple[Tensor, Tensor]


def as_lists(inputs: Inputs) -> Inputs:
    """One tensor for each view, as lightly has them from its heads."""
    return {
        **inputs, "student": list(inputs["student"].chunk(inputs["crops"])), "teacher": list(inputs["teacher"].chunk(2))
    }  # fmt: skip


# --- DINO --------------------------------------------------------------------------------------------------------


def original_dino(
    student: Tensor, teacher: Tensor, center: Tensor, crops: int, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    student_out = (student / tau_s).chunk(crops)
    teacher_out = F.softmax((teacher - center) / tau_t, dim=-1).detach().chunk(2)
    total, terms = 0, 0
    for t, target in enumerate(teacher_out):
        for v in range(len(student_out)):
            if v == t:
                continue
            loss = torch.sum(-target * F.log_softmax(student_out[v], dim=-1), dim=-1)  # again for each teacher's view
            total += loss.mean()
            terms += 1
    total /= terms
    with torch.no_grad():
        batch_center = torch.sum(teacher, dim=0, keepdim=True) / len(teacher)
        center = center * momentum + batch_center * (1 - momentum)
    return total, center[0]


def lightly_dino(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, crops: int, tau_s: float, tau_t: float,
    momentum: float,
) -> Pair:  # fmt: skip
    stacked = torch.stack(teacher)
    targets = F.softmax((stacked - center) / torch.tensor(tau_t), dim=-1)
    log_p = F.log_softmax(torch.stack(student) / tau_s, dim=-1)
    loss = -torch.einsum("tbk,sbk->ts", targets, log_p)
    loss.fill_diagonal_(0)
    terms = loss.numel() - loss.diagonal().numel()
    loss = loss.sum() / (terms * stacked.shape[1])
    with torch.no_grad():
        batch_center = torch.mean(stacked, dim=(0, 1), keepdim=True)
        center = center * momentum + batch_center * (1 - momentum)
    return loss, center[0, 0]


def targets_of(teacher: Tensor, center: Tensor, tau_t: float) -> list[tuple[Tensor, int]]:
    """What the first, the second and every other view of the student is compared with: a sum of distributions, and how
    many of them."""
    first, second = ((teacher - center) / tau_t).softmax(-1).chunk(2)
    return [(second, 1), (first, 1), (first + second, 2)]


class PairedCrossEntropy(torch.autograd.Function):
    """Sum over pairs, in one visit to each view of the student, with its gradient from the same visit:
    m softmax(s) - sum of m targets."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, center: Tensor, crops: int, tau_s: float, tau_t: float):
        targets = targets_of(teacher, center, tau_t)
        gradient, loss = torch.empty_like(student), student.new_zeros(())
        for v, (view, out) in enumerate(zip(student.chunk(crops), gradient.chunk(crops))):
            target, count = targets[min(v, 2)]
            torch.mul(view, 1 / tau_s, out=out)
            total = out.logsumexp(-1, keepdim=True)
            loss += count * total.sum() - torch.dot(out.flatten(), target.flatten())
            out.sub_(total).exp_().mul_(count).sub_(target)
        ctx.save_for_backward(gradient)
        ctx.tau_s = tau_s
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return ctx.saved_tensors[0] * (grads[0] / ctx.tau_s), None, None, None, None, None


def mean_over_pairs(total: Tensor, teacher: Tensor, crops: int) -> Tensor:
    return total / ((crops - 1) * len(teacher))  # 2 (crops - 1) pairs, len(teacher) / 2 samples


def lean_dino(
    student: Tensor, teacher: Tensor, center: Tensor, crops: int, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    total = PairedCrossEntropy.apply(student, teacher, center, crops, tau_s, tau_t)
    return mean_over_pairs(total, teacher, crops), center.lerp(teacher.mean(0), 1 - momentum)


def lean_dino_autograd(
    student: Tensor, teacher: Tensor, center: Tensor, crops: int, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    """Without a backward of its own: what a compiler may fuse at will."""
    log_p = F.log_softmax(student / tau_s, dim=-1).chunk(crops)
    targets = targets_of(teacher, center, tau_t)
    total = -sum((targets[min(v, 2)][0] * view).sum() for v, view in enumerate(log_p))
    return mean_over_pairs(total, teacher, crops), center.lerp(teacher.mean(0), 1 - momentum)


def ours_dino(
    student: Tensor, teacher: Tensor, center: Tensor, crops: int, tau_s: float, tau_t: float, momentum: float,
    inplace: bool = False,
) -> Pair:  # fmt: skip
    from sslkernels.ops import soft_cross_entropy

    loss, mean = soft_cross_entropy(
        student.view(crops, -1, student.shape[1]), teacher.view(2, -1, teacher.shape[1]), center,
        student_temp=tau_s, teacher_temp=tau_t, return_center=True, inplace=inplace,
    )  # fmt: skip
    return loss, center.lerp(mean, 1 - momentum)


class Computed(torch.autograd.Function):
    """The same memory as the leaf's, as if a layer had written it: what may be overwritten."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def ours_dino_inplace(student: Tensor, **others: Any) -> Pair:
    return ours_dino(Computed.apply(student), **others, inplace=True)


# --- The same from the bottleneck, before the prototypes ---------------------------------------------------------


def original_linear(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **others: Any) -> Pair:
    return original_dino(F.linear(student, weight), F.linear(teacher, teacher_weight), **others)


def lean_linear(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **others: Any) -> Pair:
    return lean_dino(F.linear(student, weight), F.linear(teacher, teacher_weight), **others)


def matmul_and_fused(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **others: Any) -> Pair:
    return ours_dino(F.linear(student, weight), F.linear(teacher, teacher_weight), **others)


def matmul_and_inplace(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **others: Any) -> Pair:
    return ours_dino(F.linear(student, weight), F.linear(teacher, teacher_weight), **others, inplace=True)


def ours_linear(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, crops: int, tau_s: float,
    tau_t: float, momentum: float,
) -> Pair:  # fmt: skip
    from sslkernels.ops import linear_soft_cross_entropy

    d = student.shape[1]
    loss, mean = linear_soft_cross_entropy(
        student.view(crops, -1, d), weight, teacher.view(2, -1, d), teacher_weight, center,
        student_temp=tau_s, teacher_temp=tau_t, return_center=True,
    )  # fmt: skip
    return loss, center.lerp(mean, 1 - momentum)


# --- iBOT's masked tokens ----------------------------------------------------------------------------------------


def weights_of(mask: Tensor) -> Tensor:
    """For each masked token, one over the number of them in its image."""
    return (1 / mask.sum((1, 2)).clamp(min=1))[:, None, None].expand_as(mask)[mask]


def dinov2_patches(
    student: Tensor, teacher: Tensor, center: Tensor, mask: Tensor, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    """Without xformers; one crop's rows at a time enter the centre there, here all at once."""
    with torch.no_grad():
        targets = F.softmax((teacher - center) / tau_t, dim=-1)
    loss = torch.sum(targets * F.log_softmax(student / tau_s, dim=-1), dim=-1)
    flat = mask.flatten(1)
    weights = (1 / flat.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(flat)[flat]
    loss = -(loss * weights).sum() / flat.shape[0]
    with torch.no_grad():
        batch_center = torch.sum(teacher.unsqueeze(0).mean(1), dim=0, keepdim=True)
        center = center * momentum + batch_center * (1 - momentum)
    return loss, center[0]


def lightly_patches(
    student: Tensor, teacher: Tensor, center: Tensor, mask: Tensor, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    targets = F.softmax((teacher - center) / torch.tensor(tau_t), dim=-1)
    log_p = F.log_softmax(student / tau_s, dim=-1)
    loss = -torch.sum(targets * log_p, dim=-1)
    masked = mask.sum(dim=(1, 2), keepdim=True).clamp(min=1.0)
    weight = (1.0 / masked).expand_as(mask)[mask]
    loss = (loss * weight).sum() / mask.shape[0]
    with torch.no_grad():
        batch_center = torch.mean(teacher, dim=(0,), keepdim=True)
        center = center * momentum + batch_center * (1 - momentum)
    return loss, center[0]


def lean_patches(
    student: Tensor, teacher: Tensor, center: Tensor, mask: Tensor, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    """torch's own cross-entropy with soft targets."""
    targets = ((teacher - center) / tau_t).softmax(-1)
    rows = F.cross_entropy(student / tau_s, targets, reduction="none")
    return torch.dot(rows, weights_of(mask)) / len(mask), center.lerp(teacher.mean(0), 1 - momentum)


def ours_patches(
    student: Tensor, teacher: Tensor, center: Tensor, mask: Tensor, tau_s: float, tau_t: float, momentum: float
) -> Pair:
    from sslkernels.losses import ibot_patch_loss

    loss, mean = ibot_patch_loss(teacher, student, mask, center, tau_t, tau_s, return_center=True)
    return loss, center.lerp(mean, 1 - momentum)


ORIGINAL_DINO = Contender("dino", original_dino, "facebookresearch/dino, main_dino.py, DINOLoss")
DINO = (
    Contender("sslkernels", ours_dino, OURS),
    Contender("sslkernels-inplace", ours_dino_inplace, f"{OURS}, inplace=True", changes=("student",)),
    ORIGINAL_DINO,
    Contender(
        "lightly",
        lightly_dino,
        "lightly, loss/dino_loss.py, DINOLoss (its value is off by 1e-4)",
        prepare=as_lists,
        limit=1e-3,  # one float32 sum over batch and prototypes
    ),
    Contender("lean", lean_dino, LEAN),
)
DINO_COMPILED = (
    *DINO,
    ORIGINAL_DINO.compiled(),
    Contender("lean+compile", lean_dino_autograd, f"compiled: {LEAN}, backward by autograd", compile=True),
)
LINEAR = (
    Contender("sslkernels", ours_linear, OURS),
    Contender("matmul+sslkernels", matmul_and_fused, "torch's linear and our soft_cross_entropy"),
    Contender("matmul+inplace", matmul_and_inplace, "torch's linear and our soft_cross_entropy, inplace=True"),
    Contender("dino", original_linear, "facebookresearch/dino, vision_transformer.py and main_dino.py"),
    Contender("lean", lean_linear, LEAN),
)
PATCHES = (
    Contender("sslkernels", ours_patches, OURS),
    Contender("dinov2", dinov2_patches, "facebookresearch/dinov2, loss/ibot_patch_loss.py, forward_masked"),
    Contender("lightly", lightly_patches, "lightly, loss/ibot_loss.py, IBOTPatchLoss"),
    Contender("lean", lean_patches, LEAN),
)
