# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: from a part of an image, predict the features that a slow copy of the network has of its other parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sslkernels.ema import EMA
from sslkernels.evaluation import spread
from sslkernels.methods._method import Method
from sslkernels.nn import Predictor, VisionTransformer
from sslkernels.ops import masked_regression, multiblock_mask


class IJEPA(Method):
    """Assran et al. 2023. batch = images (B, C, H, W).

        context, blocks = multiblock_mask(B, grid)                  one context and 4 blocks to predict, a sample
        prediction      = predictor(backbone(patches of context), context, blocks)      each block on its own
        target          = layer_norm(teacher(all patches))[blocks]                      no affine; no gradient
        loss            = smooth_l1(prediction, target)                                 mean over B, blocks, patches, D
        teacher        <- m * teacher + (1 - m) * backbone          in `after_step`, parameters only

    The backbone embeds and attends the context alone; the layer norm is computed for the patches that are predicted. m
    goes from `momentum` to 1 in equal steps over `total_steps`, or stays without them. Features are the teacher's,
    averaged over the patches, as in the paper's evaluation. No augmentation is needed.

    Args:
        backbone: a transformer with `forward_features(images, ids)` and `grid(images)`, without a class token.
        mask_options: of `multiblock_mask`: a grid of few patches may need a smaller `min_keep`.

    Source: facebookresearch/ijepa `src/train.py`, `src/models/vision_transformer.py`, `src/masks/multiblock.py`.

    Example:
        >>> backbone = VisionTransformer(class_token=False)
        >>> method = IJEPA(backbone, predictor_dim=64, predictor_depth=2, predictor_heads=4, total_steps=1000)
        >>> loss, metrics = method(torch.rand(8, 3, 32, 32))
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int = 12,
        momentum: float = 0.996,
        total_steps: int | None = None,
        mask_options: Mapping[str, Any] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        if backbone.num_prefix_tokens:
            raise ValueError("the backbone must have no class token: VisionTransformer(class_token=False)")
        self.backbone = backbone
        self.predictor = Predictor(
            backbone.dim, embed_dim=predictor_dim, depth=predictor_depth, num_heads=predictor_heads
        )
        schedule = "constant" if total_steps is None else "linear"
        self.teacher = EMA(backbone, momentum, schedule=schedule, total_steps=total_steps, use_buffers="ignore")
        self.mask_options = dict(mask_options or {})

    def masks(self, images: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Random ids of the context (B, K) and of the blocks to predict (B, M, T)."""
        grid = self.backbone.grid(images)
        options = {"device": images.device, **self.mask_options, **options}
        return self.draw(images, lambda rows: multiblock_mask(rows, grid, **options))

    def predict(self, images: Tensor, context: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """What the predictor makes of the context for the blocks (B, M, T, D), and all target features (B, L, D)."""
        with torch.no_grad():
            target = cast(VisionTransformer, self.teacher.module).forward_features(images)
        tokens = self.backbone.forward_features(images, context)
        return self.predictor(tokens, context, blocks, self.backbone.grid(images)), target

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        context, blocks = self.masks(batch)
        prediction, target = self.predict(batch, context, blocks)
        loss = masked_regression(prediction, target, blocks, loss="smooth_l1", normalize_target=True)
        loss = self.whole(batch).weigh(loss)
        return loss, {"loss": loss.detach(), "spread": spread(target.mean(dim=1))}

    def after_step(self, step: int) -> None:
        """Move the teacher towards the backbone."""
        self.teacher.update(self.backbone, step)

    def encode(self, x: Tensor) -> Tensor:
        return self.teacher(x)
