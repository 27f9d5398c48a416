# SPDX-License-Identifier: Apache-2.0
"""The nearest neighbours of the own rows among those of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.distributed._collectives import row_counts
from sslkernels.distributed._group import Batch
from sslkernels.ops._registry import define
from sslkernels.ops.contrastive import l2_normalize
from sslkernels.ops.neighbors import nearest


def nearest_other(batch: Batch, u: Tensor, everything: Tensor, eps: float) -> Tensor:
    """argmax over j != i of <u_i, u_j>, (N,), for the own unit rows u among the rows of all ranks, not normalised.

    The smaller index of two, as in one process. No gradient.
    """
    return _nearest_other(u, everything, batch.sizes_of(u), batch.rank, batch.world, eps)


def _reference(u: Tensor, everything: Tensor, sizes: Tensor | None, rank: int, world: int, eps: float) -> Tensor:
    n, start = u.shape[0], sum(row_counts(u.shape[0], sizes, world)[:rank])
    keys = l2_normalize(everything, eps=eps)
    # the ranks below, the own block, which is symmetric and costs half, the ranks above
    found = []
    for begin, end in ((0, start), (start, start + n), (start + n, keys.shape[0])):
        own = begin == start and end == start + n
        if end - begin > own:
            value, index = nearest(u, None if own else keys[begin:end], metric="dot", exclude_self=own)
            found.append((value, index + begin))
    values, indices = (torch.stack(x) for x in zip(*found))
    return indices.gather(0, values.argmax(0, keepdim=True))[0]


# An op, as the place of the own rows is a value that compiled code has no access to.
_nearest_other = define(
    "distributed_nearest(Tensor u, Tensor everything, Tensor? sizes, SymInt rank, SymInt world, float eps) -> Tensor",
    reference=_reference,
    fake=lambda u, everything, sizes, rank, world, eps: u.new_empty(u.shape[0], dtype=torch.int64),
    everywhere=True,
)
