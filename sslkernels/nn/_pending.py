# SPDX-License-Identifier: Apache-2.0
"""Stand-ins of the patch primitives in plain PyTorch, until `sslkernels.ops` has them."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_patches(
    x: Tensor,
    ids: Tensor | None,
    patch: tuple[int, ...],
    *,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not x.is_floating_point():
        x = x.to(dtype) / 255
    n = len(patch)
    for axis, size in enumerate(patch):
        x = x.unflatten(2 + 2 * axis, (-1, size))
    grid, inner = [2 + 2 * i for i in range(n)], [3 + 2 * i for i in range(n)]
    x = x.permute(0, *grid, 1, *inner).flatten(n + 1).flatten(1, n)
    return x if ids is None else gather_tokens(x, ids)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    if tokens.ndim == 2:
        return tokens[ids]
    return tokens[torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.ndim - 1)), ids]


def restore_tokens(
    visible: Tensor, ids: Tensor, mask_token: Tensor, position: Tensor, *, num_prefix_tokens: int = 0
) -> Tensor:
    prefix = num_prefix_tokens
    out = mask_token.expand(len(visible), len(position) - prefix, -1)
    out = out.scatter(1, ids[..., None].expand(-1, -1, visible.shape[-1]), visible[:, prefix:])
    return torch.cat([visible[:, :prefix], out], dim=1) + position
