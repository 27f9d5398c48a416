# SPDX-License-Identifier: Apache-2.0
"""Self-distillation, written out pair by pair; run in float64 it judges every contender."""

import torch
from torch import Tensor


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum_k target_k log softmax(logits)_k, for each row."""
    return -(target * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1)


def next_center(center: Tensor, rows: Tensor, momentum: float) -> Tensor:
    return momentum * center + (1 - momentum) * rows.mean(0)


def dino(
    student: Tensor, teacher: Tensor, center: Tensor, crops: int, tau_s: float, tau_t: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean over samples and over pairs of a teacher's view t with another view s of the student of
    H(softmax((teacher_t - center) / tau_t), softmax(student_s / tau_s)); and the next centre."""
    targets = ((teacher - center) / tau_t).softmax(-1).chunk(2)
    total, pairs = student.new_zeros(()), 0
    for t, target in enumerate(targets):
        for s, view in enumerate(student.chunk(crops)):
            if s != t:
                total, pairs = total + cross_entropy(target, view / tau_s).mean(), pairs + 1
    return total / pairs, next_center(center, teacher, momentum)


def linear_dino(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, **others: float
) -> tuple[Tensor, Tensor]:
    """The same of the logits x weight^T."""
    return dino(student @ weight.T, teacher @ teacher_weight.T, center, **others)


def ibot_patches(
    student: Tensor, teacher: Tensor, center: Tensor, mask: Tensor, tau_s: float, tau_t: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean over images of the mean over their masked tokens, whose rows student and teacher are; an image without any
    counts as zero."""
    rows = cross_entropy(((teacher - center) / tau_t).softmax(-1), student / tau_s)
    image = mask.nonzero()[:, 0]
    means = [rows[image == i].mean() for i in range(len(mask)) if (image == i).any()]
    return torch.stack(means).sum() / len(mask), next_center(center, teacher, momentum)


def sinkhorn_codes(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    """exp(scores / epsilon), its columns (prototypes) and rows (samples) scaled in turn to sums of 1 / K and 1 / B; by
    log-sum-exps, so that nothing overflows."""
    log = scores / epsilon
    for _ in range(iterations):
        log = log - log.logsumexp(0, keepdim=True)
        log = log - log.logsumexp(1, keepdim=True)
    return log.exp()


def swav(scores: Tensor, crops: int, tau: float, iterations: int, epsilon: float) -> Tensor:
    """Mean over the two large crops i of the mean over the other crops v of H(codes of i, softmax(scores_v / tau))."""
    views = scores.chunk(crops)
    total = scores.new_zeros(())
    for i in range(2):
        codes = sinkhorn_codes(views[i].detach(), iterations, epsilon)
        others = [cross_entropy(codes, view / tau).mean() for v, view in enumerate(views) if v != i]
        total = total + torch.stack(others).mean() / 2
    return total
