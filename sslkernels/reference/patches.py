# SPDX-License-Identifier: Apache-2.0
"""The patch primitives in plain differentiable PyTorch: the definition. Any device, any floating dtype.

An id that names no patch, or one twice where that is refused, reads and writes nothing outside its tensor: what
depends on it is NaN. Nothing here synchronises a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.reference._precision import compute_dtype

Patch = tuple[int, int, int]

# where a channel goes among the values of a patch: first (c, t, p, q), as in the weight of a convolution, or last
CHANNELS_FIRST, CHANNELS_LAST = (0, 2, 4, 6, 1, 3, 5, 7), (0, 2, 4, 6, 3, 5, 7, 1)


def patch_of(patch_size: int | Sequence[int]) -> Patch:
    """(t, p, q); an image is a clip of one frame."""
    sizes = [patch_size] * 2 if isinstance(patch_size, int) else list(patch_size)
    t, p, q = [1] * (3 - len(sizes)) + sizes
    return t, p, q


def grid_of(images: Tensor, patch: Patch) -> tuple[int, int, int]:
    """How many patches fit along time, height and width."""
    t, h, w = ([1] * (5 - images.ndim) + list(images.shape[2:]))[-3:]
    return t // patch[0], h // patch[1], w // patch[2]


def cells(images: Tensor, patch: Patch, channels_last: bool) -> Tensor:
    """A view of the images: (B, T', H', W', then the values of a patch on four axes)."""
    x = images if images.ndim == 5 else images.unsqueeze(2)
    for axis, size in zip((6, 4, 2), reversed(patch)):
        x = x.unflatten(axis // 2 + 1, (x.shape[axis // 2 + 1] // size, size))
    return x.permute(CHANNELS_LAST if channels_last else CHANNELS_FIRST)  # of (B, C, T', t, H', p, W', q)


def outside(ids: Tensor, length: int) -> Tensor:
    return (ids < 0) | (ids >= length)


def repeated(ids: Tensor, length: int) -> Tensor:
    """Where an id is outside [0, length), or not the only one of its value in its row. (B, K)"""
    out = outside(ids, length)
    known = ids.masked_fill(out, 0)
    count = torch.zeros(ids.shape[0], length, dtype=torch.int64, device=ids.device)
    count.scatter_add_(1, known, (~out).to(torch.int64))
    return out | (count.gather(1, known) > 1)


def spoil(x: Tensor, bad: Tensor) -> Tensor:
    """NaN in the rows where bad is True; zero in a dtype that has no NaN."""
    bad = bad.reshape(*bad.shape, *(1,) * (x.ndim - bad.ndim))
    return x.masked_fill(bad, torch.nan if x.is_floating_point() else 0)


def values(images: Tensor, mean: Any = None, std: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Pixels as numbers: bytes divided by 255, then (x - mean) / std for each channel; in the dtype to compute in."""
    x = images.to(compute_dtype(images, dtype or torch.float32))
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None:
        shape = (-1, *(1,) * (images.ndim - 2))
        mean, std = (torch.as_tensor(m, dtype=x.dtype, device=x.device).detach().view(shape) for m in (mean, std))
        x = (x - mean) / std
    return x


def take_patches(images: Tensor, ids: Tensor | None, patch: Patch, channels_last: bool) -> Tensor:
    """The patches as they are. (B, K, C*t*p*q)"""
    view = cells(images, patch, channels_last)
    batch, grid = images.shape[0], grid_of(images, patch)
    if ids is None:
        return view.reshape(
            batch, grid[0] * grid[1] * grid[2], -1 if view.numel() else images.shape[1] * _volume(patch)
        )
    ids = ids.expand(batch, -1)
    bad = outside(ids, grid[0] * grid[1] * grid[2])
    known = ids.masked_fill(bad, 0)
    rows = torch.arange(batch, device=ids.device)[:, None]
    across = grid[1] * grid[2]
    taken = view[rows, known // across, known % across // grid[2], known % grid[2]]  # (B, K, ...)
    return spoil(taken.reshape(*ids.shape, images.shape[1] * _volume(patch)), bad)


def _volume(patch: Patch) -> int:
    return patch[0] * patch[1] * patch[2]


def gather_patches(
    images: Tensor,
    ids: Tensor | None = None,
    patch_size: int | Sequence[int] = 16,
    *,
    channels_last: bool = False,
    mean: Any = None,
    std: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out[b, k] = the values of patch ids[b, k] of image b, in the order (c, t, p, q) or (t, p, q, c)."""
    out = dtype or (images.dtype if images.is_floating_point() else torch.float32)
    return take_patches(values(images, mean, std, out), ids, patch_of(patch_size), channels_last).to(out)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """out[b, ..., k] = tokens[b, ids[b, ..., k]], or tokens[ids[b, ..., k]] of a table without a batch."""
    bad = outside(ids, tokens.shape[-2])
    known = ids.masked_fill(bad, 0)
    if tokens.ndim == 2:
        return spoil(tokens[known], bad)
    rows = torch.arange(tokens.shape[0], device=ids.device).reshape(-1, *(1,) * (ids.ndim - 1))
    return spoil(tokens[rows, known], bad)


def restore_tokens(
    visible: Tensor,
    ids: Tensor,
    mask_token: Tensor,
    position: Tensor | None = None,
    length: int | None = None,
    *,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """out[b, P + ids[b, k]] = visible[b, P + k], the other rows the mask token, prefix rows first; plus position."""
    batch, prefix, dim = visible.shape[0], num_prefix_tokens, visible.shape[2]
    ids = ids.expand(batch, -1)
    length = length if position is None else position.shape[-2] - prefix
    assert length is not None, "restore_tokens needs position or length"
    bad = repeated(ids, length).any(1)
    known = ids.masked_fill(outside(ids, length), 0)
    dtype = torch.promote_types(visible.dtype, mask_token.dtype)
    rows = torch.arange(batch, device=ids.device)[:, None]
    out = (
        mask_token.reshape(dim)
        .to(dtype)
        .expand(batch, length, dim)
        .index_put((rows, known), visible[:, prefix:].to(dtype))
    )
    out = torch.cat([visible[:, :prefix].to(dtype), out], 1)
    if position is not None:
        # added in the precision of the sum: rounded once
        out = out + position.reshape(prefix + length, dim)
    return spoil(out, bad)


def normalize_targets(target: Tensor, channels: int, normalize: str | None, eps: float, channels_last: bool) -> Tensor:
    """Patches (..., P) less their mean, by their unbiased deviation: jointly (MAE) or by channel (VideoMAE)."""
    if normalize is None:
        return target
    if normalize == "patch":
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps) ** 0.5
    axis = -2 if channels_last else -1
    t = target.unflatten(-1, (-1, channels) if channels_last else (channels, -1))
    t = (t - t.mean(axis, keepdim=True)) / (t.var(axis, keepdim=True).sqrt() + eps)
    return t.flatten(-2)


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int] = 16,
    *,
    normalize: str | None = None,
    eps: float = 1e-6,
    loss: str = "l2",
    channels_last: bool = True,
    mean: Any = None,
    std: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over a patch of (pred - target)^2 or |pred - target|, for the patches of ids; then the reduction."""
    patch = patch_of(patch_size)
    grid = grid_of(images, patch)
    ids = ids.expand(images.shape[0], -1)
    bad = repeated(ids, grid[0] * grid[1] * grid[2])
    dtype = compute_dtype(pred, images)
    with torch.no_grad():
        target = take_patches(values(images, mean, std, dtype), ids, patch, channels_last)
        target = normalize_targets(target, images.shape[1], normalize, eps, channels_last)
    if pred.shape[1] != ids.shape[1]:
        pred = gather_tokens(pred, ids)
    error = pred.to(dtype) - target
    row = spoil((error.abs() if loss == "l1" else error * error).mean(-1), bad)  # (B, M)
    return row if reduction == "none" else row.mean() if reduction == "mean" else row.sum()


def permute_patches(images: Tensor, ids: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """Patch l of the result is patch ids[b, l] of image b."""
    patch = patch_of(patch_size)
    ids = ids.expand(images.shape[0], -1)
    bad = repeated(ids, ids.shape[1]).any(1)
    out = assemble(take_patches(images, ids, patch, False), images.shape, patch, False)
    return spoil(out, bad)


def assemble(patches: Tensor, shape: Sequence[int], patch: Patch, channels_last: bool) -> Tensor:
    """Images of `shape` from all of their patches in order: the inverse of taking them."""
    batch, channels = shape[:2]
    t, h, w = [s // p for s, p in zip(([1] * (5 - len(shape)) + list(shape[2:]))[-3:], patch)]
    sizes = (*patch, channels) if channels_last else (channels, *patch)
    order = CHANNELS_LAST if channels_last else CHANNELS_FIRST
    back = [order.index(i) for i in range(8)]
    return patches.reshape(batch, t, h, w, *sizes).permute(back).reshape(tuple(shape))
