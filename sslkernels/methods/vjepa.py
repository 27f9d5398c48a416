# SPDX-License-Identifier: Apache-2.0
"""V-JEPA: predict a moving average's features of what is hidden of a clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslkernels.ema import EMA
from sslkernels.methods._method import Method
from sslkernels.nn import Predictor, VisionTransformer
from sslkernels.ops import masked_regression, multiblock3d_mask

# Options of `multiblock3d_mask`: eight small blocks and two large ones, through all frames.
MASKS = ({"blocks": 8, "spatial_scale": (0.15, 0.15)}, {"blocks": 2, "spatial_scale": (0.7, 0.7)})


class VJEPA(Method):
    """Bardes et al. 2024, Assran et al. 2025. batch = clips (B, C, T, H, W), float or uint8.

        h = layer_norm(teacher(batch))                           all patches, no gradient, no affine
        for each kind of mask i: context, target = ids of the seen and of the hidden patches
            z = predictor(backbone(the context patches alone))   at the target places, from mask token i
            loss_i = mean |z - h[target]|
        loss = mean over i of loss_i
        teacher <- m teacher + (1 - m) backbone                  after the optimizer's step

    The momentum is V-JEPA 2's, constant; `momentum=0.998, final_momentum=1.0, total_steps=N` is V-JEPA's, linear.
    Positions are added sine-cosine ones, V-JEPA's; the rotary ones of V-JEPA 2 belong to a backbone that has them.
    The backbone has no class token. Features are the teacher's, averaged over the patches.

    Source: facebookresearch/jepa `app/vjepa/train.py`, facebookresearch/vjepa2 `app/vjepa/train.py`, with their
    regularizer of weight zero left out.

    Example:
        >>> backbone = VisionTransformer(patch_size=(2, 8, 8), class_token=False)
        >>> method = VJEPA(backbone, predictor_dim=64, predictor_depth=2, predictor_heads=4)
        >>> loss, metrics = method(torch.rand(2, 3, 8, 64, 64))
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int = 12,
        masks: Sequence[Mapping[str, Any]] = MASKS,
        momentum: float = 0.99925,
        final_momentum: float | None = None,
        total_steps: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        if len(backbone.patch_size) != 3 or backbone.num_prefix_tokens:
            raise ValueError(
                "the backbone must take clips and have no class token, got "
                f"patch_size={backbone.patch_size}, class_token={bool(backbone.num_prefix_tokens)}"
            )
        if not masks:
            raise ValueError("masks is empty")
        self.masks = [dict(options) for options in masks]
        self.backbone = backbone
        self.predictor = Predictor(
            backbone.dim,
            embed_dim=predictor_dim,
            depth=predictor_depth,
            num_heads=predictor_heads,
            num_mask_tokens=len(self.masks),
        )
        nn.init.zeros_(self.predictor.mask_tokens)  # the original's default
        self.teacher = EMA(
            backbone,
            momentum,
            final_momentum=final_momentum,
            total_steps=total_steps,
            schedule="constant" if total_steps is None else "linear",
        )

    def forward(self, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        grid = self.backbone.grid(batch)
        with torch.no_grad():
            h = cast(VisionTransformer, self.teacher.module).forward_features(batch)
        losses = []
        for i, options in enumerate(self.masks):
            options = {"grid": grid, "device": batch.device, "generator": generator, **options}
            context, target = self.draw(batch, partial(multiblock3d_mask, **options))
            z = self.predictor(self.backbone.forward_features(batch, context), context, target, grid, mask=i)
            losses.append(masked_regression(z, h, target, loss="l1", normalize_target=True))
        loss = self.whole(batch).weigh(torch.stack(losses).mean())
        return loss, {"loss": loss.detach(), **{f"mask{i}": part.detach() for i, part in enumerate(losses)}}

    def after_step(self, step: int) -> None:
        """Move the teacher towards the backbone."""
        self.teacher.update(self.backbone, step)

    def encode(self, x: Tensor) -> Tensor:
        return self.teacher.module(x)
