# SPDX-License-Identifier: Apache-2.0
"""BEiT: blocks of an image are hidden, and the discrete codes of their patches are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import masked_lm_loss
from sslkernels.losses._common import IGNORE
from sslkernels.methods._method import Method
from sslkernels.nn import VisionTransformer
from sslkernels.nn.transformer import init_linear
from sslkernels.ops import block_mask


class BEiT(Method):
    """Bao et al. 2021. batch = images (B, C, H, W).

        codes  = tokenizer(images)                                              (B, L) in [0, num_codes), no gradient
        mask   = blocks of patches, about 75 of 196
        tokens = the patches' embeddings, a learned token in place of the masked ones, plus positions: the whole grid
        loss   = mean over the masked patches of cross_entropy(head(backbone(tokens)), codes)

    The head runs on the masked patches alone, and its logits are never stored. Features are the backbone's own.

    Args:
        backbone: a `VisionTransformer`; its positions are fixed ones, BEiT's a learned bias of the attention.
        tokenizer: any callable that gives each patch of the backbone's grid its code. The original's is the discrete
            VAE of DALL-E, with 8,192 codes of a second view of half the size; `nn.PatchTokenizer`, the nearest of
            k-means centroids, needs no weights of others.
        num_codes: V.
        mask_options: of `block_mask`, whose blocks have 16 patches at the least, as the original's: give a small grid
            smaller ones.

    Source: microsoft/unilm `beit/modeling_pretrain.py`, `engine_for_pretraining.py`, `masking_generator.py`.

    Example:
        >>> from sslkernels.nn import PatchTokenizer
        >>> images = torch.rand(16, 3, 32, 32)
        >>> tokenizer = PatchTokenizer.fit(images, 64, patch_size=4)
        >>> method = BEiT(VisionTransformer(patch_size=4), tokenizer, num_codes=64, mask_options={"min_patches": 4})
        >>> loss, metrics = method(images)
    """

    masks: Mapping[str, Any] = {"ratio": 75 / 196, "style": "beit"}

    def __init__(
        self,
        backbone: VisionTransformer,
        tokenizer: Callable[[Tensor], Tensor],
        *,
        num_codes: int = 8192,
        mask_options: Mapping[str, Any] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.mask_options = {**self.masks, **(mask_options or {})}
        self.backbone, self.tokenizer = backbone, tokenizer
        self.mask_token = nn.Parameter(torch.zeros(backbone.dim))
        self.head = nn.Linear(backbone.dim, num_codes)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        init_linear(self.head, "normal")

    def mask(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random places (B, h, w) bool, True where hidden."""
        grid, device = self.backbone.grid(images), images.device
        options = {"device": device, "generator": generator, **self.mask_options}
        return self.draw(images, lambda rows: block_mask(rows, grid, **options))

    def forward(self, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        backbone, mask = self.backbone, self.mask(batch, generator).flatten(1)
        with torch.no_grad():
            codes = self.tokenizer(batch)
        if codes.shape != mask.shape:
            raise ValueError(f"the tokenizer must give codes {tuple(mask.shape)}, got {tuple(codes.shape)}")
        tokens = backbone.embed(batch)
        tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = backbone.forward_tokens(tokens + backbone.positions(batch))[:, backbone.num_prefix_tokens :]
        # rows of visible patches are ignored, and cost nothing
        target = codes.masked_fill(~mask, IGNORE)
        loss = masked_lm_loss(tokens, self.head.weight, target, self.head.bias, process_group=self.process_group)
        return loss, {"loss": loss.detach()}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
