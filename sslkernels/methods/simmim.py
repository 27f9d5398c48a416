# SPDX-License-Identifier: Apache-2.0
"""SimMIM: large squares of an image are hidden, a linear head paints them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.methods._method import Method
from sslkernels.nn import VisionTransformer
from sslkernels.ops import gather_tokens, masked_patch_loss, random_mask, restore_tokens


class SimMIM(Method):
    """Xie et al. 2022. batch = images (B, C, H, W), float or uint8.

        masked = ceil(mask_ratio * cells) of the cells of mask_patch_size pixels, each several patches
        tokens = the patches' embeddings, a learned token in place of the masked ones, plus positions: the whole grid
        loss = mean |head(backbone(tokens)) - pixels| over the masked pixels, normalized as the backbone does

    The backbone sees every place, so hiding saves no time in it, and what it learns serves networks that cannot drop
    tokens. Features are the backbone's own.

    Source: microsoft/SimMIM `models/simmim.py`, `data/data_simmim.py::MaskGenerator`. Its divisor, the number of
    masked pixels + 1e-5, is the number here.

    Example:
        >>> method = SimMIM(VisionTransformer(patch_size=4), mask_patch_size=8)
        >>> loss, metrics = method(torch.rand(8, 3, 32, 32))
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        mask_ratio: float = 0.6,
        mask_patch_size: int = 32,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        if len(backbone.patch_size) != 2 or any(mask_patch_size % size for size in backbone.patch_size):
            raise ValueError(
                f"mask_patch_size must be a multiple of the backbone's patches of {backbone.patch_size}, "
                f"got {mask_patch_size}"
            )
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        self.mask_ratio, self.mask_patch_size = mask_ratio, mask_patch_size
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(backbone.dim))
        # the 1x1 convolution and pixel shuffle of the original, at the masked patches alone
        self.head = nn.Linear(backbone.dim, backbone.patch_embed.in_channels * math.prod(backbone.patch_size))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def mask(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Ids of the visible and of the masked patches: cells of the coarse grid, each spelled out."""
        size = self.mask_patch_size
        if images.shape[-2] % size or images.shape[-1] % size:
            raise ValueError(f"image height and width must be multiples of {size}, got {tuple(images.shape)}")
        rows, columns = images.shape[-2] // size, images.shape[-1] // size
        count = math.ceil(self.mask_ratio * rows * columns)
        # half a cell less: random_mask rounds the number of visible ones down
        ratio = (count - 0.5) / (rows * columns)
        options: dict[str, Any] = {"device": images.device, "generator": generator}
        cells = self.draw(images, lambda n: random_mask(n, rows * columns, ratio, **options))
        p, q = (size // patch for patch in self.backbone.patch_size)  # patches of a cell
        patches = torch.arange(rows * p * columns * q, device=images.device).view(rows, p, columns, q)
        table = patches.transpose(1, 2).reshape(rows * columns, p * q)
        visible, masked = (table[ids].flatten(1).sort(dim=1).values for ids in cells)
        return visible, masked

    def forward(self, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        backbone = self.backbone
        visible, masked = self.mask(batch, generator)
        tokens = backbone.embed(batch, visible)  # those of the masked ones would be thrown away
        tokens = restore_tokens(tokens, visible, self.mask_token, backbone.positions(batch))
        tokens = backbone.forward_tokens(tokens)
        pred = self.head(gather_tokens(tokens, masked + backbone.num_prefix_tokens))
        loss = masked_patch_loss(
            pred,
            batch,
            masked,
            backbone.patch_size,
            loss="l1",
            channels_last=False,
            mean=backbone.mean,
            std=backbone.std,
        )
        loss = self.whole(batch).weigh(loss)
        return loss, {"loss": loss.detach()}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
