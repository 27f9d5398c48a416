# SPDX-License-Identifier: Apache-2.0
"""The functions of self-distillation with a centre that is given to them: DINO, iBOT's patch loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed import Batch
from sslkernels.distributed.distillation import mean_logits
from sslkernels.ops.distillation import linear_soft_cross_entropy, soft_cross_entropy
from sslkernels.reference._precision import compute_dtype

Views = Tensor | Sequence[Tensor]
Center = Tensor | Callable[[Batch], Tensor | None] | None


@distributed.raises_together
def dino_loss(
    teacher_out: Views,
    student_out: Views,
    center: Center = None,
    teacher_temp: float = 0.04,
    student_temp: float = 0.1,
    *,
    weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    return_center: bool = False,
    inplace: bool = False,
    process_group: Any = None,
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
        center: (V,), (1, V) or (1, 1, V); none is zero; (T, V) is one a view. Or a function that makes it, of the rows
            of all ranks, from the `distributed.Batch`.
        weight: (V, D), the prototypes of the student, where the outputs are hidden rows (..., D); it gets its gradient
            if it requires one.
        teacher_weight: those of the teacher; weight if not given.
        return_center: return (loss, mean of the teacher's logits (V,)), which is what updates a centre.
        inplace: write the gradient over the student's logits, as `soft_cross_entropy` does: for those of a linear layer
            that nobody reads again. Not with weight.
        process_group: as in `distributed.Group`; both means are then over the rows of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; a single row of views (B, V); one view of each, which
            leaves no pair; an empty batch; a temperature that is not positive.

    Example:
        >>> student = torch.randn(10, 4, 32, requires_grad=True)
        >>> dino_loss(torch.randn(2, 4, 32), student).backward()

    Source: Caron et al. 2021, `main_dino.py::DINOLoss`; DINOv2 `loss/dino_clstoken_loss.py`; lightly `DINOLoss`.
    """
    batch = _views_batch(
        *(process_group, "dino_loss", teacher_out, student_out),
        center=center, weight=weight, teacher_weight=teacher_weight, teacher_temp=teacher_temp,
        student_temp=student_temp, return_center=return_center,
    )  # fmt: skip
    if callable(center):
        center = center(batch)
    result = _cross_entropy(
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
    if not return_center:
        return batch.weigh(result)
    return batch.weigh(result[0]), mean_logits(batch, result[1], batch.rows)


@distributed.raises_together
def ibot_patch_loss(
    teacher_out: Tensor,
    student_out: Tensor,
    mask: Tensor,
    center: Center = None,
    teacher_temp: float = 0.04,
    student_temp: float = 0.1,
    *,
    weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    return_center: bool = False,
    inplace: bool = False,
    center_mean: Tensor | None = None,
    process_group: Any = None,
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
        center, weight, teacher_weight, return_center, inplace, process_group: as in `dino_loss`; the mean of the logits
            is over the given tokens, of all ranks. A rank may have none, and where nobody has one it is center.
        center_mean: (V,), a mean over the own images, which return_center then returns for those of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; no image; center_mean without return_center; a mask
            that does not have N true (on another device than the CPU the loss is NaN instead).

    Example:
        >>> mask = torch.rand(4, 7, 7) < 0.3
        >>> student = torch.randn(int(mask.sum()), 32, requires_grad=True)
        >>> ibot_patch_loss(torch.randn(student.shape), student, mask).backward()

    Source: Zhou et al. 2022, `main_ibot.py::iBOTLoss`; DINOv2 `loss/ibot_patch_loss.py`; lightly `IBOTPatchLoss`.
    """
    if center_mean is not None and not return_center:
        raise ValueError("center_mean must not be given with center_mode='sinkhorn_knopp', or without return_center")
    batch = _tokens_batch(
        *(process_group, "ibot_patch_loss", teacher_out, student_out, mask),
        center=center, weight=weight, teacher_weight=teacher_weight, teacher_temp=teacher_temp,
        student_temp=student_temp, return_center=return_center, center_mean=center_mean,
    )  # fmt: skip
    if callable(center):
        center = center(batch)
    result = _cross_entropy(
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
        return_center=return_center and center_mean is None,
    )
    if not return_center:
        return batch.weigh(result)
    if center_mean is not None:
        width = student_out.shape[1] if weight is None else weight.shape[0]
        check.vector("center_mean", center_mean, width, student_out, check.FLOATS)
        mean = center_mean.detach().to(compute_dtype(center_mean))
        return batch.weigh(result), mean_logits(batch, mean, batch.rows)
    return batch.weigh(result[0]), mean_logits(batch, result[1], teacher_out.shape[0], center)


def _views_batch(process_group: Any, loss: str, teacher_out: Views, student_out: Views, **brought: Any) -> Batch:
    """The samples of all ranks, after a check of the views."""
    views = [count_views(name, x) for name, x in (("teacher_out", teacher_out), ("student_out", student_out))]
    if views == [1, 1]:
        raise ValueError("student_out must have at least two views, or teacher_out: a view is not compared with itself")
    if process_group is not None:
        _check_alike("teacher_out", teacher_out)
        _check_alike("student_out", student_out)
    return distributed.batch(
        *(process_group, None, loss),
        student_out=_first_view(student_out), teacher_out=_first_view(teacher_out), student_views=views[1],
        teacher_views=views[0], **brought,
    )  # fmt: skip


def _tokens_batch(
    process_group: Any, loss: str, teacher_out: Tensor, student_out: Tensor, mask: Tensor, **brought: Any
) -> Batch:
    """The images of all ranks, after a check of the tokens, whose number is each rank's own."""
    for name, x in (("teacher_out", teacher_out), ("student_out", student_out)):
        check.tensor(name, x)
        if x.ndim != 2 or x.shape[0] != teacher_out.shape[0]:
            expected = "(N, V)" if name == "teacher_out" else f"({teacher_out.shape[0]}, V), as teacher_out"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    _check_mask(mask, student_out)
    if process_group is None:
        return distributed.alone(mask)
    no_tokens = {"student_out": student_out[:0], "teacher_out": teacher_out[:0]}
    return distributed.batch(process_group, None, loss, mask=mask, **no_tokens, **brought)


def _first_view(views: Views) -> Tensor:
    view = views if isinstance(views, Tensor) else views[0]
    return view if view.ndim == 2 else view[0]


def _check_alike(name: str, views: Views) -> None:
    """What the op asks of all views: ranks compare the first, and would wait for one that the op refuses another."""
    if isinstance(views, Tensor):
        return
    for i, view in enumerate(views):
        label, first = f"{name}[{i}]", f"{name}[0]"
        if view.shape[-2:] != views[0].shape[-2:]:
            expected = f"the (B, V) of {first} {tuple(views[0].shape[-2:])}"
            raise ValueError(f"{label} must have {expected}, got {tuple(view.shape)}")
        check.same_dtype(label, view, first, views[0])
        check.same_device(label, view, first, views[0])


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


def _check_mask(mask: Any, tokens: Tensor) -> None:
    check.tensor("mask", mask)
    check.same_device("mask", mask, "student_out", tokens)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    if mask.ndim < 2 or mask.shape[0] == 0:
        raise ValueError(f"mask must have shape (B, ...) with B > 0, got {tuple(mask.shape)}")
    if check.readable(mask) and (masked := int(mask.sum())) != tokens.shape[0]:
        raise ValueError(f"mask must have {tokens.shape[0]} true, as many as there are tokens, got {masked}")


def _token_weights(mask: Tensor, tokens: Tensor) -> Tensor:
    """1 / (masked tokens of the token's image * images) for each token; NaN where mask has another number of them."""
    count, masked = tokens.shape[0], mask.flatten(1).sum(1)
    last = masked.cumsum(0)
    # mask.nonzero() would say to which image a token belongs, but its length is a value, which nobody may wait for
    image = torch.searchsorted(last, torch.arange(count, device=mask.device), right=True).clamp_max(mask.shape[0] - 1)
    weights = (masked * mask.shape[0]).to(compute_dtype(tokens)).reciprocal()
    return weights[image].where(last[-1] == count, torch.nan)
