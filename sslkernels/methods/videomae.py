# SPDX-License-Identifier: Apache-2.0
"""VideoMAE: see a tenth of a clip, the same places in every frame, and paint the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.methods.mae import MAE
from sslkernels.nn import VisionTransformer
from sslkernels.ops import tube_mask


class VideoMAE(MAE):
    """Tong et al. 2022. batch = clips (B, C, T, H, W), float or uint8; the backbone's patches are (t, p, q).

        visible, masked = a random tenth of the places of a frame, the same in all frames, and the others
        pred = decoder(backbone(the visible patches alone))                 at the masked places
        loss = mean (pred - t)^2,  t the masked patches' values, each channel of a patch with mean 0 and deviation 1

    What differs from `MAE`: the tubes, without which a patch could be copied from the next frame; the target, per
    channel, normalized by default, and never of normalized clips; the decoder's first layer, without bias. The
    original's encoder has no class token (`class_token=False`); features are the mean of its tokens. Positions are
    sine-cosine in three dimensions, where the original counts all patches in one.

    Source: MCG-NJU/VideoMAE `engine_for_pretraining.py`, `modeling_pretrain.py`, `masking_generator.py`; the ratio is
    the paper's and the scripts'.

    Example:
        >>> backbone = VisionTransformer(patch_size=(2, 8, 8), class_token=False)
        >>> method = VideoMAE(backbone, decoder_dim=64, decoder_depth=2)
        >>> loss, metrics = method(torch.rand(2, 3, 8, 32, 32))
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        mask_ratio: float = 0.9,
        norm_pix_loss: bool = True,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            backbone,
            mask_ratio=mask_ratio,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            decoder_bias=False,
            process_group=process_group,
        )
        self.target = {"normalize": "channel" if norm_pix_loss else None, "mean": None, "std": None}
        if len(backbone.patch_size) != 3:
            raise ValueError(f"the backbone must take clips, with patch_size (t, p, q), got {backbone.patch_size}")

    def mask(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        frames, *grid = self.backbone.grid(images)
        options: dict[str, Any] = {"device": images.device, "generator": generator}
        return self.draw(images, lambda rows: tube_mask(rows, frames, tuple(grid), self.mask_ratio, **options))
