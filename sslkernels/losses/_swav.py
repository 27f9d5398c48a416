# SPDX-License-Identifier: Apache-2.0
"""The function of SwAV, whose centre is that of Sinkhorn over its own scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.distributed.distillation import sinkhorn_centers
from sslkernels.ops.distillation import soft_cross_entropy


@distributed.raises_together
def swav_loss(
    high_resolution_outputs: Sequence[Tensor],
    low_resolution_outputs: Sequence[Tensor] = (),
    queue_outputs: Sequence[Tensor] | None = None,
    temperature: float = 0.1,
    sinkhorn_iterations: int = 3,
    sinkhorn_epsilon: float = 0.05,
    *,
    process_group: Any = None,
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
        process_group: as in `distributed.Group`; codes then balance the samples and the queues of all ranks.

    Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process.

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
            check.same_dtype(f"{name}[{i}]", x, "high_resolution_outputs[0]", high[0])
    scores = [x.detach() for x in high]
    if queue_outputs is not None:
        if len(queue_outputs) != len(high):
            raise ValueError(
                f"queue_outputs must hold one queue for each of {len(high)} crops, got {len(queue_outputs)}"
            )
        for i, x in enumerate(queue_outputs):
            _check_like(f"queue_outputs[{i}]", x, high[0])
        scores = [torch.cat([x, queue.detach()]) for x, queue in zip(scores, queue_outputs)]
    batch = distributed.batch(
        *(process_group, None, "swav_loss"),
        scores=high[0], high_resolution_crops=len(high), low_resolution_crops=len(low),
        queue=", ".join(str(x.dtype) for x in queue_outputs or ()), temperature=temperature,
        sinkhorn_iterations=sinkhorn_iterations, sinkhorn_epsilon=sinkhorn_epsilon,
    )  # fmt: skip
    centers = sinkhorn_centers(batch, scores, sinkhorn_iterations, sinkhorn_epsilon)
    targets = [x.detach() for x in high]
    crops, epsilon = [*high, *low], sinkhorn_epsilon
    return batch.weigh(soft_cross_entropy(crops, targets, centers, student_temp=temperature, teacher_temp=epsilon))


def _check_like(name: str, x: Any, first: Tensor, rows: int | None = None) -> None:
    """(B, K) of the device and width of `first`, and of as many rows where those are given."""
    check.floating(name, x)
    if x.ndim != 2 or first.ndim != 2 or x.shape[1] != first.shape[1] or rows not in (None, x.shape[0]):
        expected = "(B, K)" if first.ndim != 2 else f"({'Q' if rows is None else rows}, {first.shape[1]})"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    check.same_device(name, x, "high_resolution_outputs[0]", first)
