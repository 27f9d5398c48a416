# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops over a batch that several ranks hold: the same arguments, and the `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sslkernels._autocast import cast_features
from sslkernels.distributed._group import Batch
from sslkernels.distributed._logsumexp import logsumexp
from sslkernels.ops import contrastive as ops
from sslkernels.ops.contrastive import NOTHING, SELF, Exclude


def similarity_logsumexp(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
    *,
    scales: Sequence[float] | None = None,
    columns: bool = True,
    return_positive: bool = False,
    return_max: bool = False,
) -> Any:
    """`ops.similarity_logsumexp` of the own queries with the keys of all ranks, and of the own keys with all queries.

    `exclude.diagonal` and `period` are places in the own rows: a sample and its partner are on one rank. Groups and
    masks are those of the own rows, and are compared with those of all ranks.
    """
    options: dict[str, Any] = {"columns": columns, "return_positive": return_positive, "return_max": return_max}
    if batch.local:
        return ops.similarity_logsumexp(q, k, scale, exclude, scales=scales, **options)
    q, k = cast_features(q, k)
    offset = exclude.diagonal if return_positive else None
    row, col, positive, top = _call(batch, q, k, scale, exclude, scales, columns, offset, half=False)
    out = (row, col if columns else None)
    return out + (positive,) * return_positive + (top,) * return_max


def self_similarity_logsumexp(
    batch: Batch,
    z: Tensor,
    scale: Tensor | float = 1.0,
    exclude: Exclude = SELF,
    *,
    scales: Sequence[float] | None = None,
    return_positive: bool = False,
    return_max: bool = False,
) -> Any:
    """`ops.self_similarity_logsumexp` of the rows of all ranks, for the own ones.

    Each pair of ranks meets once, which is half the work; with `return_max`, twice.
    """
    options: dict[str, Any] = {"scales": scales, "return_positive": return_positive, "return_max": return_max}
    if batch.local:
        return ops.self_similarity_logsumexp(z, scale, exclude, **options)
    (z,) = cast_features(z)
    offset = exclude.period if return_positive else None
    lse, _, positive, top = _call(batch, z, None, scale, exclude, scales, False, offset, half=not return_max)
    out = (lse,) + (positive,) * return_positive + (top,) * return_max
    return out if len(out) > 1 else lse


def _call(
    batch: Batch,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor | float,
    exclude: Exclude,
    scales: Sequence[float] | None,
    columns: bool,
    offset: int | None,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    multipliers = (1.0,) if scales is None else tuple(map(float, scales))
    pair = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    sizes = batch.sizes_of(q if k is None else k)
    route = (sizes, batch.rank, batch.world, batch.strategy, sizes is None, batch.name)
    row, col, positive, top, _ = logsumexp(q, k, *pair, *exclude, multipliers, columns, offset, half, *route)
    if scales is None:
        row, col = row[0], col[0] if columns else col
    return row, col, positive, top
