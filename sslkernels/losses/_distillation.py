# SPDX-License-Identifier: Apache-2.0
"""The functions of self-distillation over prototypes: DINO, iBOT's patch loss, SwAV; a centre is given to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops.distillation import linear_soft_cross_entropy, sinkhorn_center, soft_cross_entropy
from sslkernels.reference._precision import compute_dtype

Views = Tensor | Sequence[Tensor]


def dino_loss(
    teacher_out: Views,
    student_out: Views,
    center: Tensor | None = None,
    teacher_temp: float = 0.04,
    student_temp: float = 0.1,
    *,
    weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    return_center: bool = False,
    inplace: bool = False,
) -> Any:
    """Cross-entropy of each student view with each other teacher view of the sample.

        p_t = softmax((teacher_t - center) / teacher_temp)        constant
        q_s = softmax(student_s / student_temp)
        loss_i = sum over t, s with t != s of H(p_t, q_s) / (T S - min(T, S))
        loss = mean of the samples

    The value is the same in DINO, lightly, and, for 2 teacher views, DINOv2 (its global and local terms together,
    before their weights). View t of the teacher shows the same crop as view t of the student: the global crops come
    first in both.

    Args:
        teacher_out: T views of (B, V): a list, or (T, B, V).
        student_out: S views, global and local: a list of (B, V) and (S_i, B, V), or (S, B, V).
        center: (V,), (1, V) or (1, 1, V); none is zero; (T, V) is one a view.
        weight: (V, D), the prototypes of the student, where the outputs are hidden rows (..., D); it gets its gradient
            if it requires one.
        teacher_weight: those of the teacher; weight if not given.
        return_center: return (loss, mean of the teacher's logits (V,)), which is what updates a centre.
        inplace: write the gradient over the student's logits, as `soft_cross_entropy` does: for those of a linear layer
            that nobody reads again. Not with weight.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; a single row of views (B, V); one view of each, which
            leaves no pair; an empty batch; a temperature that is not positive.

    Example:
        >>> student = torch.randn(10, 4, 32, requires_grad=True)
        >>> dino_loss(torch.randn(2, 4, 32), student).backward()

    Source: Caron et al. 2021, `main_dino.py::DINOLoss`; DINOv2 `loss/dino_clstoken_loss.py`; lightly `DINOLoss`.
    """
    views = [count_views(name, x) for name, x in (("teacher_out", teacher_out), ("student_out", student_out))]
    if views == [1, 1]:
        raise ValueError("student_out must have at least two views, or teacher_out: a view is not compared with itself")
    return _cross_entropy(
        teacher_out,
        student_out,
        center,
        weight,
        teacher_weight,
        inplace,
        teacher_temp=teacher_temp,
        student_temp=student_temp,
        return_center=return_center,
    )


def ibot_patch_loss(
    teacher_out: Tensor,
    student_out: Tensor,
    mask: Tensor,
    center: Tensor | None = None,
    teacher_temp: float = 0.04,
    student_temp: float = 0.1,
    *,
    weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    return_center: bool = False,
    inplace: bool = False,
) -> Any:
    """Cross-entropy of the masked tokens of the student with the same tokens of the teacher.

        p_n = softmax((teacher_n - center) / teacher_temp)        constant
        loss_i = mean over the masked tokens n of image i of H(p_n, softmax(student_n / student_temp)), 0 without any
        loss = mean of the B images, also of those without a masked token

    Only masked tokens are given, as in DINOv2 and lightly; iBOT has the same value from all tokens. Sum over the
    global crops, or take them as one batch and multiply, as the method has it: iBOT takes their mean.

    Args:
        teacher_out, student_out: (N, V), the N masked tokens in the order of mask.
        mask: (B, ...) bool, such as (B, H, W), with N true.
        center, weight, teacher_weight, return_center, inplace: as in `dino_loss`; the mean is over the given tokens.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; no image; a mask that does not have N true (on another
            device than the CPU the loss is NaN instead).

    Example:
        >>> mask = torch.rand(4, 7, 7) < 0.3
        >>> student = torch.randn(int(mask.sum()), 32, requires_grad=True)
        >>> ibot_patch_loss(torch.randn(student.shape), student, mask).backward()

    Source: Zhou et al. 2022, `main_ibot.py::iBOTLoss`; DINOv2 `loss/ibot_patch_loss.py`; lightly `IBOTPatchLoss`.
    """
    for name, x in (("teacher_out", teacher_out), ("student_out", student_out)):
        check.tensor(name, x)
        if x.ndim != 2 or x.shape[0] != teacher_out.shape[0]:
            expected = "(N, V)" if name == "teacher_out" else f"({teacher_out.shape[0]}, V), as teacher_out"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    return _cross_entropy(
        teacher_out,
        student_out,
        center,
        weight,
        teacher_weight,
        inplace,
        teacher_temp=teacher_temp,
        student_temp=student_temp,
        row_weight=_token_weights(mask, student_out),
        reduction="sum",
        return_center=return_center,
    )


def swav_loss(
    high_resolution_outputs: Sequence[Tensor],
    low_resolution_outputs: Sequence[Tensor] = (),
    queue_outputs: Sequence[Tensor] | None = None,
    temperature: float = 0.1,
    sinkhorn_iterations: int = 3,
    sinkhorn_epsilon: float = 0.05,
) -> Tensor:
    """Cross-entropy of each crop's prediction with the codes of each other high-resolution crop.

        codes_t = sinkhorn_knopp(scores of crop t, and of its queue below them)        constant
        loss_i = mean over t and crops s != t of H(codes_t, softmax(scores_s / temperature))
        loss = mean of the samples

    The value is lightly's and the original's; they return shape (1,) and (), here it is a scalar. Codes are not stored:
    softmax((scores - c) / epsilon) with c from `sinkhorn_center`.

    Args:
        high_resolution_outputs: T tensors of scores (B, K), cosines of features and prototypes.
        low_resolution_outputs: further ones, which are predicted from but give no codes.
        queue_outputs: T tensors (Q, K): scores of stored features with the prototypes of now, only for Sinkhorn.
        sinkhorn_iterations, sinkhorn_epsilon: as in `sinkhorn_knopp`.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; fewer than two crops; not as many queues as
            crops; an empty batch.

    Example:
        >>> high = [torch.randn(4, 32, requires_grad=True) for _ in range(2)]
        >>> swav_loss(high, [torch.randn(4, 32, requires_grad=True)]).backward()

    Source: Caron et al. 2020, `main_swav.py::train`; lightly `SwaVLoss`.
    """
    high, low = list(high_resolution_outputs), list(low_resolution_outputs)
    if not high or len(high) + len(low) < 2:
        raise ValueError(
            "high_resolution_outputs must hold a crop, and with low_resolution_outputs two, "
            f"got {len(high)} and {len(low)}"
        )
    check.floating("high_resolution_outputs[0]", high[0])
    check.not_empty("high_resolution_outputs[0]", high[0])
    for name, crops in (("high_resolution_outputs", high), ("low_resolution_outputs", low)):
        for i, x in enumerate(crops):
            _check_like(f"{name}[{i}]", x, high[0], high[0].shape[0])
    scores = [x.detach() for x in high]
    if queue_outputs is not None:
        if len(queue_outputs) != len(high):
            raise ValueError(
                f"queue_outputs must hold one queue for each of {len(high)} crops, got {len(queue_outputs)}"
            )
        for i, x in enumerate(queue_outputs):
            _check_like(f"queue_outputs[{i}]", x, high[0])
        scores = [torch.cat([x, queue.detach()]) for x, queue in zip(scores, queue_outputs)]
    centers = torch.stack([sinkhorn_center(x, sinkhorn_iterations, sinkhorn_epsilon) for x in scores])
    targets = [x.detach() for x in high]
    return soft_cross_entropy([*high, *low], targets, centers, student_temp=temperature, teacher_temp=sinkhorn_epsilon)


def count_views(name: str, x: Any) -> int:
    """How many views of a non-empty batch a list of (B, ...) and (S, B, ...), or one (S, B, ...), holds."""
    several = isinstance(x, list | tuple)
    views = list(x) if several else [x]
    for i, view in enumerate(views):
        label = f"{name}[{i}]" if several else name
        check.floating(label, view)
        if view.ndim != 3 and (view.ndim != 2 or isinstance(x, Tensor)):
            raise ValueError(
                f"{label} must be a list of views (B, V) or one tensor (S, B, V), got shape {tuple(view.shape)}"
            )
        if view.shape[-2] == 0:
            raise ValueError(f"{label} must not be an empty batch, got shape {tuple(view.shape)}")
    return sum(view.shape[0] if view.ndim == 3 else 1 for view in views)


def _cross_entropy(
    teacher: Views,
    student: Views,
    center: Tensor | None,
    weight: Tensor | None,
    teacher_weight: Tensor | None,
    inplace: bool,
    **options: Any,
) -> Any:
    """Of logits, or where the prototypes are given of hidden rows."""
    if weight is None:
        if teacher_weight is not None:
            raise ValueError("teacher_weight must not be given without weight")
        return soft_cross_entropy(student, teacher, center, inplace=inplace, **options)
    if inplace:
        raise ValueError("inplace must be False with weight: there are no logits to write over")
    return linear_soft_cross_entropy(student, weight, teacher, teacher_weight, center, **options)


def _token_weights(mask: Any, tokens: Tensor) -> Tensor:
    """1 / (masked tokens of the token's image * images) for each token; NaN where mask has another number of them."""
    check.tensor("mask", mask)
    check.same_device("mask", mask, "student_out", tokens)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    if mask.ndim < 2 or mask.shape[0] == 0:
        raise ValueError(f"mask must have shape (B, ...) with B > 0, got {tuple(mask.shape)}")
    count, masked = tokens.shape[0], mask.flatten(1).sum(1)
    last = masked.cumsum(0)
    if check.readable(mask) and int(last[-1]) != count:
        raise ValueError(f"mask must have {count} true, as many as there are tokens, got {int(last[-1])}")
    # mask.nonzero() would say to which image a token belongs, but its length is a value, which nobody may wait for
    image = torch.searchsorted(last, torch.arange(count, device=mask.device), right=True).clamp_max(mask.shape[0] - 1)
    weights = (masked * mask.shape[0]).to(compute_dtype(tokens)).reciprocal()
    return weights[image].where(last[-1] == count, torch.nan)


def _check_like(name: str, x: Any, first: Tensor, rows: int | None = None) -> None:
    """(B, K) of the device and width of `first`, and of as many rows where those are given."""
    check.floating(name, x)
    if x.ndim != 2 or first.ndim != 2 or x.shape[1] != first.shape[1] or rows not in (None, x.shape[0]):
        expected = "(B, K)" if first.ndim != 2 else f"({'Q' if rows is None else rows}, {first.shape[1]})"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    check.same_device(name, x, "high_resolution_outputs[0]", first)
