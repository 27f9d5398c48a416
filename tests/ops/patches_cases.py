# SPDX-License-Identifier: Apache-2.0
"""Images in every layout, and the originals' formulas written out patch by patch, for the tests of the patch ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "flipped", "expanded")


def images_of(
    batch: int, channels: int, sides: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Tensor:
    """Random images or clips with these strides; expanded: one image seen by the whole batch."""
    shape = (batch, channels, *sides)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randint(256, tuple(shape)).byte() if dtype == torch.uint8 else torch.randn(tuple(shape)).to(dtype)

    if layout == "channels_last":
        return draw((batch, *sides, channels)).movedim(-1, 1)
    if layout == "sliced":
        return draw((batch, channels + 1, *sides[:-1], 2 * sides[-1] + 1))[:, 1:, ..., 1::2]
    if layout == "flipped":
        return draw((batch, channels, *reversed(sides))).permute(0, 1, *range(len(shape) - 1, 1, -1))
    if layout == "expanded":
        return draw((1, *shape[1:])).expand(shape)
    return draw(shape)


def cut(images: Tensor, patch: Sequence[int], channels_last: bool) -> Tensor:
    """All patches (B, L, P), cut out one by one; the sides of patch are those of the images' own axes."""
    clip = images if images.ndim == 5 else images.unsqueeze(2)
    t, p, q = (1, *patch)[-3:]
    rows = []
    for frame in range(0, clip.shape[2], t):
        for top in range(0, clip.shape[3], p):
            for left in range(0, clip.shape[4], q):
                one = clip[:, :, frame : frame + t, top : top + p, left : left + q]
                rows.append((one.movedim(1, -1) if channels_last else one).flatten(1))
    return torch.stack(rows, 1)


def mae_loss(pred: Tensor, images: Tensor, mask: Tensor, p: int, norm_pix_loss: bool) -> Tensor:
    """MAE: pred (B, L, p * p * 3), mask (B, L) one where hidden; the mean over hidden patches."""
    target = cut(images, (p, p), True)
    if norm_pix_loss:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def videomae_loss(pred: Tensor, clips: Tensor, ids: Tensor, patch: Sequence[int], mean: Tensor, std: Tensor) -> Tensor:
    """VideoMAE: pixels back in [0, 1], each channel of a tube by its own mean and deviation, the mean of squares."""
    shape = (1, -1, 1, 1, 1)
    pixels = clips * std.view(shape) + mean.view(shape)
    tubes = cut(pixels, patch, True).unflatten(-1, (-1, clips.shape[1]))  # (B, L, values of a channel, C)
    middle, deviation = tubes.mean(-2, keepdim=True), tubes.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6
    labels = ((tubes - middle) / deviation).flatten(2)
    return torch.nn.functional.mse_loss(pred, labels.gather(1, ids[..., None].expand(-1, -1, labels.shape[2])))


def simmim_loss(reconstruction: Tensor, images: Tensor, mask: Tensor, p: int) -> Tensor:
    """SimMIM: mean absolute error over hidden pixels; mask (B, H/p, W/p)."""
    pixels = mask.repeat_interleave(p, 1).repeat_interleave(p, 2).unsqueeze(1)
    loss = torch.nn.functional.l1_loss(images, reconstruction, reduction="none")
    return (loss * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]


def mae_decoder_input(x: Tensor, ids_restore: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    """MAE: mask tokens behind the visible ones, all moved to their places, class token first, positions added."""
    mask_tokens = mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
    rest = torch.cat([x[:, 1:, :], mask_tokens], dim=1)
    rest = torch.gather(rest, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return torch.cat([x[:, :1, :], rest], dim=1) + position


def distinct_ids(batch: int, count: int, length: int) -> Tensor:
    return torch.rand(batch, length).argsort(1)[:, :count]


def gradients(out: Tensor, wanted: Sequence[Tensor], cotangent: Tensor) -> list[Any]:
    return list(torch.autograd.grad(out, wanted, cotangent.to(out.dtype), retain_graph=True, materialize_grads=True))


def close(x: Tensor, exact: Tensor, size: Tensor | None = None, *, scale: float = 2.0) -> None:
    """|x - exact| within `scale` roundings, by norm, of `size`: of what a sum adds up, where its terms may cancel.

    16-bit results are sums in float32, rounded once.
    """
    assert x.shape == exact.shape, (x.shape, exact.shape)
    eps = torch.finfo(x.dtype).eps
    of_sums = eps if x.dtype == torch.float64 else torch.finfo(torch.float32).eps
    error = float((x.detach().double() - exact.detach()).norm())
    terms = exact if size is None else size
    limit = scale * of_sums * float(terms.detach().double().norm()) + eps * float(exact.detach().norm())
    assert error <= limit, (error, limit)
