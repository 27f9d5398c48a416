# SPDX-License-Identifier: Apache-2.0
"""MAE: see a quarter of an image's patches, paint the others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sslkernels.methods._method import Method
from sslkernels.nn import MaskedDecoder, VisionTransformer
from sslkernels.ops import gather_patches, masked_patch_loss, random_mask


class MAE(Method):
    """He et al. 2022. batch = images (B, C, H, W), float or uint8.

        visible, masked = a random quarter of the patches, and the others
        pred = decoder(backbone(the visible patches alone))                 at the masked places
        loss = mean (pred - t)^2,  t the masked patches' values, (p, q, c) in order

    With `norm_pix_loss` (the original's command line has it, its default is off) each patch's t has its own mean and
    standard deviation taken out. Where the backbone normalizes images, t are values of the normalized image. The class
    token, where the backbone has one, takes part in encoder and decoder. Features are the backbone's own: its class
    token, as in the original's linear probe, or without one the mean.

    Source: facebookresearch/mae `models_mae.py`, `main_pretrain.py`.

    Example:
        >>> method = MAE(VisionTransformer(patch_size=4), decoder_dim=64, decoder_depth=2)
        >>> loss, metrics = method(torch.rand(8, 3, 32, 32))
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_bias: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.mask_ratio = mask_ratio
        self.backbone = backbone
        # how masked_patch_loss makes the target
        self.target: dict[str, Any] = {
            "normalize": "patch" if norm_pix_loss else None, "mean": backbone.mean, "std": backbone.std
        }  # fmt: skip
        self.decoder = MaskedDecoder(
            backbone.dim,
            backbone.patch_embed.in_channels * math.prod(backbone.patch_size),
            embed_dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            num_prefix_tokens=backbone.num_prefix_tokens,
            bias=decoder_bias,
        )

    def mask(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Ids of the visible and of the masked patches, drawn for each image."""
        length = math.prod(self.backbone.grid(images))
        options: dict[str, Any] = {"device": images.device, "generator": generator}
        return self.draw(images, lambda rows: random_mask(rows, length, self.mask_ratio, **options))

    def forward(self, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        visible, masked = self.mask(batch, generator)
        tokens = self.backbone.forward_features(batch, visible)
        pred = self.decoder(tokens, visible, self.backbone.grid(batch), masked)
        loss = masked_patch_loss(pred, batch, masked, self.backbone.patch_size, **self.target)
        loss = self.whole(batch).weigh(loss)
        return loss, {"loss": loss.detach()}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Float images (B, C, H, W) with their masked patches grey, and with them painted by the decoder.

        With `norm_pix_loss` the decoder does not tell a patch's mean and spread: they are taken from the image.
        """
        visible, masked = self.mask(images, generator)
        size, grid = self.backbone.patch_size, self.backbone.grid(images)
        pred = self.decoder(self.backbone.forward_features(images, visible), visible, grid, masked)
        patches = gather_patches(images, None, size, channels_last=True)  # (B, L, P)
        pred = self._pixels(pred.to(patches.dtype), images, masked)
        index = masked[..., None].expand_as(pred)
        grey, painted = (patches.scatter(1, index, values) for values in (torch.full_like(pred, 0.5), pred))
        return unpatchify(grey, grid, size), unpatchify(painted, grid, size)

    def _pixels(self, pred: Tensor, images: Tensor, masked: Tensor) -> Tensor:
        """Predictions (B, M, P) out of the target's units, back into those of the images."""
        normalize, mean, std = self.target["normalize"], self.target["mean"], self.target["std"]
        size, channels = self.backbone.patch_size, images.shape[1]
        target = gather_patches(images, masked, size, channels_last=True, mean=mean, std=std)
        pred, target = (x.unflatten(-1, (-1, channels)) for x in (pred, target))
        if normalize is not None:
            over = (-2, -1) if normalize == "patch" else (-2,)
            pred = pred * target.std(dim=over, keepdim=True) + target.mean(dim=over, keepdim=True)
        if std is not None:
            pred = pred * torch.as_tensor(std).to(pred)
        if mean is not None:
            pred = pred + torch.as_tensor(mean).to(pred)
        return pred.flatten(-2)


def unpatchify(patches: Tensor, grid: tuple[int, ...], patch_size: tuple[int, ...]) -> Tensor:
    """Images (B, C, H, W), or clips, from all their patches (B, L, P) in channels-last order."""
    n = len(grid)
    x = patches.reshape(len(patches), *grid, *patch_size, -1)
    sides = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]
    x = x.permute(0, 2 * n + 1, *sides)
    return x.reshape(*x.shape[:2], *(size * patch for size, patch in zip(grid, patch_size)))
