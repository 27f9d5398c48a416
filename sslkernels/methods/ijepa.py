# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: from a part of an image, predict the features that a slow copy of the encoder has of its other parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslkernels.ema import EMA
from sslkernels.evaluation import spread
from sslkernels.methods._method import Method
from sslkernels.nn import Predictor, VisionTransformer
from sslkernels.ops import masked_regression, multiblock_mask


class IJEPA(Method):
    """Assran et al. 2023. batch = images (B, C, H, W).

        context, blocks = multiblock_mask(B, grid)                  one context and 4 blocks to predict, a sample
        prediction      = predictor(encoder(patches of context), context, blocks)       each block on its own
        target          = layer_norm(target_encoder(all patches))[blocks]               no affine; no gradient
        loss            = smooth_l1(prediction, target)                                 mean over B, blocks, patches, D
        target_encoder <- m * target_encoder + (1 - m) * encoder    in `after_step`, parameters only

    The encoder embeds and attends the context alone; the layer norm is computed for the patches that are predicted. m
    goes from `momentum` to 1 in equal steps over `total_steps`, or stays without them. `encode` is the mean of the
    target encoder's patch tokens, as in the paper's evaluation. No augmentation is needed.

    Args:
        encoder: a transformer with `forward_features(images, ids)`, `grid(images)` and `pool`, without a class token.
        predictor: `Predictor`'s arguments; by default the paper's, 384 wide and 12 deep.
        mask_options: of `multiblock_mask`, such as `min_keep`, which the default 10 makes too much of a small grid.

    Source: facebookresearch/ijepa `src/train.py`, `src/models/vision_transformer.py`, `src/masks/multiblock.py`.

    Example:
        >>> method = IJEPA(VisionTransformer(class_token=False), Predictor(128), total_steps=1000)
        >>> loss, metrics = method(torch.rand(8, 3, 32, 32))
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: nn.Module | None = None,
        *,
        momentum: float = 0.996,
        total_steps: int | None = None,
        mask_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if encoder.num_prefix_tokens:
            raise ValueError("encoder must have no class token: VisionTransformer(class_token=False)")
        self.encoder = encoder
        self.predictor = predictor or Predictor(encoder.dim, embed_dim=384, depth=12, num_heads=12)
        schedule = "constant" if total_steps is None else "linear"
        self.target = EMA(encoder, momentum, schedule=schedule, total_steps=total_steps, use_buffers="ignore")
        self.mask_options = dict(mask_options or {})

    def masks(self, images: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Random ids of the context (B, K) and of the blocks to predict (B, M, T)."""
        grid = self.encoder.grid(images)
        return multiblock_mask(len(images), grid, device=images.device, **self.mask_options, **options)

    def predict(self, images: Tensor, context: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """What the predictor makes of the context for the blocks (B, M, T, D), and all target features (B, L, D)."""
        with torch.no_grad():
            target = cast(VisionTransformer, self.target.module).forward_features(images)
        tokens = self.encoder.forward_features(images, context)
        return self.predictor(tokens, context, blocks, self.encoder.grid(images)), target

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        context, blocks = self.masks(batch)
        prediction, target = self.predict(batch, context, blocks)
        loss = masked_regression(prediction, target, blocks, loss="smooth_l1", normalize_target=True)
        return loss, {"loss": loss.detach(), "spread": spread(target.mean(dim=1))}

    def after_step(self, step: int) -> None:
        """Move the target encoder towards the encoder."""
        self.target.update(self.encoder, step)

    def encode(self, x: Tensor) -> Tensor:
        return self.target(x)
