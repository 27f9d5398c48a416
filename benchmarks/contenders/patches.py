# SPDX-License-Identifier: Apache-2.0
"""Patch contenders: what the masked autoencoders ship, restated, and our algebra in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS

# --- Patches of the pixels ---------------------------------------------------------------------------------------


def grid_view(images: Tensor, p: int) -> Tensor:
    """(B, C, H, W) as (B, H / p, W / p, C, p, p), without a copy."""
    return images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)


def indexed(images: Tensor, ids: Tensor, p: int) -> Tensor:
    """The patches at `ids` and nothing else, out of the view: (B, K, C, p, p)."""
    across = images.shape[-1] // p
    sample = torch.arange(len(images), device=images.device)[:, None]
    return grid_view(images, p)[sample, ids // across, ids % across]


def lean_gather(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    return indexed(images, ids, patch_size).flatten(2)


def lightly_gather(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Every patch, then those at `ids`; channels last, which is the same number of bytes."""
    b, c, h, _ = images.shape
    p, across = patch_size, h // patch_size
    patches = torch.einsum("nchpwq->nhwpqc", images.reshape(b, c, across, p, across, p)).reshape(b, across**2, -1)
    return torch.gather(patches, 1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def channels_first(patches: Tensor) -> Tensor:
    """A (p, q, c) patch in the formula's order."""
    return patches.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)


def ours_gather(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    from sslkernels.ops import gather_patches

    return gather_patches(images, ids, patch_size)


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.float().div(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def lightly_gather_uint8(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    return lightly_gather(normalised(images, mean, std), ids, patch_size)


def lean_gather_uint8(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    return normalised(indexed(images, ids, patch_size), mean, std).flatten(2)


def ours_gather_uint8(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    from sslkernels.ops import gather_patches

    return gather_patches(images, ids, patch_size, mean=mean, std=std)


# --- Embedding of the visible patches ----------------------------------------------------------------------------


def mae_embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = x + position[None]
    return torch.gather(x, dim=1, index=ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))


def lightly_embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = x + position[None]
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def lean_embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    return F.linear(lean_gather(images, ids, weight.shape[-1]), weight.flatten(1), bias) + position[ids]


def ours_embed(images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    from sslkernels.ops import embed_patches

    return embed_patches(images, ids, weight, bias, position, weight.shape[-1])


# --- Loss on the masked patches ----------------------------------------------------------------------------------


def with_mask(inputs: Inputs) -> Inputs:
    """MAE hands over a mask of the patches, 1 where they were removed."""
    pred, ids = inputs["pred"], inputs.pop("ids")
    return {**inputs, "mask": torch.zeros(pred.shape[:2]).scatter_(1, ids, 1.0)}


def mae_loss(pred: Tensor, images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    b, c, h, _ = images.shape
    p, across = patch_size, h // patch_size
    target = torch.einsum("nchpwq->nhwpqc", images.reshape(b, c, across, p, across, p)).reshape(b, across**2, p**2 * c)
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    loss = (pred - target) ** 2
    loss = loss.mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def vit_mae_loss(pred: Tensor, images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """As MAE's but for the patches, which are permuted and not handed to einsum."""
    b, c, h, w = images.shape
    p = patch_size
    target = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p**2 * c)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def lean_loss(pred: Tensor, images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    with torch.no_grad():
        target = indexed(images, ids, patch_size).permute(0, 1, 3, 4, 2).flatten(2)  # (B, M, p * q * c)
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target.sub_(mean).mul_((var + 1e-6).rsqrt())
    return F.mse_loss(pred.gather(1, ids.unsqueeze(-1).expand_as(target)), target)


def ours_loss(pred: Tensor, images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    from sslkernels.ops import masked_patch_loss

    return masked_patch_loss(pred, images, ids, patch_size, normalize="patch")


Tubelet = tuple[int, int, int]


def with_tube_mask(inputs: Inputs) -> Inputs:
    tubelet, clips, ids = inputs["tubelet"], inputs["clips"], inputs.pop("ids")
    length = clips[0, 0].numel() // (tubelet[0] * tubelet[1] * tubelet[2])
    return {**inputs, "mask": torch.zeros(len(clips), length, dtype=torch.bool).scatter_(1, ids, True)}


def tubes(clips: Tensor, tubelet: Tubelet) -> Tensor:
    """(B, C, T, H, W) as (B, patches, values of a channel, C)."""
    t, p, q = tubelet
    grid = clips.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(2, (-1, t))  # (B, C, T/t, t, H/p, p, W/q, q)
    return grid.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def videomae_loss(pred: Tensor, clips: Tensor, mask: Tensor, tubelet: Tubelet, mean: Tensor, std: Tensor) -> Tensor:
    with torch.no_grad():
        clips = clips * std[None, :, None, None, None] + mean[None, :, None, None, None]
        x = tubes(clips, tubelet)
        x = (x - x.mean(dim=-2, keepdim=True)) / (x.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        x = x.flatten(2)
        labels = x[mask].reshape(len(x), -1, x.shape[-1])
    return F.mse_loss(pred, labels)


def lean_tube_loss(pred: Tensor, clips: Tensor, ids: Tensor, tubelet: Tubelet, mean: Tensor, std: Tensor) -> Tensor:
    with torch.no_grad():
        t, p, q = tubelet
        down, across = clips.shape[-2] // p, clips.shape[-1] // q
        grid = clips.unflatten(4, (-1, q)).unflatten(3, (-1, p)).unflatten(2, (-1, t)).permute(0, 2, 4, 6, 3, 5, 7, 1)
        sample = torch.arange(len(clips))[:, None]
        x = grid[sample, ids // (down * across), ids // across % down, ids % across].flatten(2, 4)  # (B, M, t*p*q, C)
        x.mul_(std).add_(mean)
        centre = x.mean(2, keepdim=True)
        x = x.sub_(centre).div_(x.std(2, keepdim=True).add_(1e-6))
    return F.mse_loss(pred, x.flatten(2))


def ours_tube_loss(pred: Tensor, clips: Tensor, ids: Tensor, tubelet: Tubelet, mean: Tensor, std: Tensor) -> Tensor:
    from sslkernels.ops import masked_patch_loss

    # The clip is normalised, its target is not: x * std + mean = (x - (-mean / std)) / (1 / std).
    return masked_patch_loss(pred, clips, ids, tubelet, normalize="channel", mean=-mean / std, std=1 / std)


# --- The decoder's input -----------------------------------------------------------------------------------------


def with_restore(inputs: Inputs) -> Inputs:
    """MAE keeps the permutation that puts visible and then masked tokens back in order."""
    ids, length = inputs.pop("ids"), len(inputs["position"]) - 1
    masked = torch.ones(len(ids), length).scatter_(1, ids, 0.0)
    shuffle = torch.cat([ids, masked.nonzero()[:, 1].view(len(ids), -1)], dim=1)
    return {**inputs, "ids_restore": shuffle.argsort(dim=1)}


def mae_restore(visible: Tensor, ids_restore: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    b, k, d = visible.shape
    mask_tokens = mask_token.repeat(b, ids_restore.shape[1] + 1 - k, 1)
    x = torch.cat([visible[:, 1:, :], mask_tokens], dim=1)
    x = torch.gather(x, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, d))
    x = torch.cat([visible[:, :1, :], x], dim=1)
    return x + position[None]


def lightly_restore(visible: Tensor, ids: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    """Mask tokens everywhere, then the visible ones over them."""
    b, _, d = visible.shape
    x = mask_token.repeat(b, len(position), 1)
    keep = torch.cat([ids.new_zeros(b, 1), ids + 1], dim=1)
    x = torch.scatter(x, 1, keep.unsqueeze(-1).expand(-1, -1, d), visible)
    return x + position[None]


def lean_restore(visible: Tensor, ids: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    keep = F.pad(ids + 1, (1, 0))
    sample = torch.arange(len(visible))[:, None]
    blank = (mask_token[0] + position).expand(len(visible), -1, -1)
    return blank.index_put((sample, keep), visible + position[keep])


def ours_restore(visible: Tensor, ids: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    from sslkernels.ops import restore_tokens

    return restore_tokens(visible, ids, mask_token, position, num_prefix_tokens=1)


MAE = "facebookresearch/mae, models_mae.py"
LIGHTLY = "lightly 1.6, models/utils.py"
HF = "transformers 5.23, models/vit_mae/modeling_vit_mae.py"
VIDEOMAE = "MCG-NJU/VideoMAE, engine_for_pretraining.py"

GATHER = (
    Contender("sslkernels", ours_gather, OURS),
    Contender("lightly", lightly_gather, f"{LIGHTLY}: patchify, get_at_index", result=channels_first),
    Contender("lean", lean_gather, LEAN),
)
GATHER_UINT8 = (
    Contender("sslkernels", ours_gather_uint8, OURS),
    Contender("lightly", lightly_gather_uint8, f"normalise, then {LIGHTLY}", result=channels_first),
    Contender("lean", lean_gather_uint8, LEAN),
)
EMBED = (
    Contender("sslkernels", ours_embed, OURS),
    Contender("mae", mae_embed, f"{MAE}, forward_encoder and random_masking; {HF} does the same"),
    Contender("lightly", lightly_embed, f"timm's patch embedding, then {LIGHTLY}: get_at_index"),
    Contender("lean", lean_embed, LEAN),
)
LOSS = (
    Contender("sslkernels", ours_loss, OURS),
    Contender("mae", mae_loss, f"{MAE}, forward_loss", prepare=with_mask),
    Contender("transformers", vit_mae_loss, f"{HF}, ViTMAEForPreTraining", prepare=with_mask),
    Contender("lean", lean_loss, LEAN),
    Contender("mae", mae_loss, f"{MAE}, forward_loss", prepare=with_mask).compiled(),
    Contender("lean", lean_loss, LEAN).compiled(),
)
TUBE_LOSS = (
    Contender("sslkernels", ours_tube_loss, OURS),
    Contender("videomae", videomae_loss, VIDEOMAE, prepare=with_tube_mask),
    Contender("lean", lean_tube_loss, LEAN),
)
RESTORE = (
    Contender("sslkernels", ours_restore, OURS),
    Contender("mae", mae_restore, f"{MAE}, forward_decoder; {HF} does the same", prepare=with_restore),
    Contender("lightly", lightly_restore, f"{LIGHTLY}: repeat_token, set_at_index"),
    Contender("lean", lean_restore, LEAN),
)
