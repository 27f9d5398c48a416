# SPDX-License-Identifier: Apache-2.0
"""What the patch ops compute, written out patch by patch; run in float64 it judges every contender."""

import torch
from torch import Tensor


def patch(images: Tensor, b: int, number: int, p: int) -> Tensor:
    """Patch `number`, counted row by row, of image b: (C, p, p)."""
    row, column = divmod(number, images.shape[-1] // p)
    return images[b, :, row * p : (row + 1) * p, column * p : (column + 1) * p]


def gather_patches(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """out[b, k] = the values of patch ids[b, k] in the order (c, p, q)."""
    return torch.stack([
        torch.stack([patch(images, b, i, patch_size).flatten() for i in row]) for b, row in enumerate(ids.tolist())
    ])  # fmt: skip


def gather_uint8(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """The same of (images / 255 - mean) / std."""
    return gather_patches((images.double() / 255 - mean[:, None, None]) / std[:, None, None], ids, patch_size)


def embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """out[b, k] = <W, patch ids[b, k]> + bias + position[ids[b, k]]."""
    patches = gather_patches(images, ids, weight.shape[-1])
    return patches @ weight.flatten(1).T + bias + position[ids]


def masked_patch_loss(pred: Tensor, images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Mean over masked patches of mean_v (pred_v - (x_v - mean) / sqrt(var + 1e-6))^2, x in the order (p, q, c)."""
    losses = []
    rows = iter(pred.flatten(0, 1).unbind())  # one node of the graph for all rows
    for b in range(len(ids)):
        masked = set(ids[b].tolist())
        for i, row in zip(range(pred.shape[1]), rows):
            if i not in masked:
                continue
            x = patch(images, b, i, patch_size).permute(1, 2, 0).flatten()
            target = (x - x.mean()) / (x.var(correction=1) + 1e-6).sqrt()
            losses.append((row - target).square().mean())
    return torch.stack(losses).mean()


def masked_tube_loss(
    pred: Tensor, clips: Tensor, ids: Tensor, tubelet: tuple[int, int, int], mean: Tensor, std: Tensor
) -> Tensor:
    """The same, row k of pred for patch ids[b, k] of a clip in [0, 1], (x - mean_c) / (std_c + 1e-6) per channel."""
    t, p, q = tubelet
    clips = clips * std[:, None, None, None] + mean[:, None, None, None]
    across, down = clips.shape[-1] // q, clips.shape[-2] // p
    losses = []
    rows = iter(pred.flatten(0, 1).unbind())
    for b in range(len(ids)):
        for i, row in zip(ids[b].tolist(), rows):
            frame, rest = divmod(i, down * across)
            y, x = divmod(rest, across)
            tube = clips[b, :, frame * t : (frame + 1) * t, y * p : (y + 1) * p, x * q : (x + 1) * q].flatten(1)
            target = (tube - tube.mean(1, keepdim=True)) / (tube.std(1, correction=1, keepdim=True) + 1e-6)
            losses.append((row - target.T.flatten()).square().mean())  # (p, q, c)
    return torch.stack(losses).mean()


def restore_tokens(visible: Tensor, ids: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    """out[b, 0] = visible[b, 0]; out[b, 1 + ids[b, k]] = visible[b, 1 + k]; mask_token elsewhere; + position."""
    samples = []
    for row, sample in zip(ids.tolist(), visible.unbind(), strict=True):
        first, *given = sample.unbind()
        tokens = [mask_token.flatten()] * (len(position) - 1)
        for i, token in zip(row, given, strict=True):
            tokens[i] = token
        samples.append(torch.stack([first, *tokens]) + position)
    return torch.stack(samples)
