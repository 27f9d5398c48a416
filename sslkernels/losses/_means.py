# SPDX-License-Identifier: Apache-2.0
"""Means over the rows of all ranks, for losses that ask of another rank no more than how many rows count there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sslkernels import distributed
from sslkernels.distributed import Batch


def counted_batch(process_group: Any, loss: str, /, **brought: Any) -> Batch:
    """The batch of a loss whose rows are counted when it is computed.

    The first of `brought` is (..., D), and of its shape only D is compared: a rank may have any number of rows in any
    call, also none. Only where there are no other ranks must it have some.
    """
    name, x = next(iter(brought.items()))
    if process_group is None:
        batch = distributed.alone(x)
    else:
        batch = distributed.batch(process_group, None, loss, **{**brought, name: x.new_empty(0, x.shape[-1])})
    if batch.local and x.numel() == 0:
        raise ValueError(f"{name} must not be an empty batch, got shape {tuple(x.shape)}")
    return batch


def reduce_by(loss: Callable[[str], Tensor], reduction: str, batch: Batch, count: Callable[[], Tensor]) -> Tensor:
    """As `_common.reduce`, of an op that reduces its rows itself: `loss` takes "mean", "sum" or "none" of the own ones.

    count: how many own rows count, (), called where there are other ranks. The gradients that the op emits for its sum
    are float32 at least, and are rounded to 16 bits after the division by the number of all rows.
    """
    if batch.local or reduction == "none":
        return loss(reduction)
    total = loss("sum") * batch.world
    return total if reduction == "sum" else quotient(total, batch.sum(count()))


def quotient(total: Tensor, count: Tensor) -> Tensor:
    """total / count; NaN where nothing counts, not by dividing by 0, which would send infinity to gradients of 0."""
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)
