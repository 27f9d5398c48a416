# SPDX-License-Identifier: Apache-2.0
"""DINOv2: DINO and iBOT together, with features that are kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.losses import koleo_loss
from sslkernels.methods.ibot import IBOT
from sslkernels.nn import VisionTransformer


class DINOv2(IBOT):
    """Oquab et al. 2023. batch = crops, a list: two global ones, then any number of local ones, each (B, C, H, W).

        loss = dino_weight * cls + ibot_weight * patch + koleo_weight * (koleo(c_0) + koleo(c_1))

    cls and patch are iBOT's terms, c_v (B, dim) the student's class tokens of global crop v before the head. What
    differs from `IBOT`: exactly half of the global crops are masked, each by its own slice of the ratios; the masked
    patches alone pass the teacher's head, and move the patches' center; one temperature, 0.04 to 0.07, for both terms;
    the lengths of the prototypes are learned.

    Args:
        backbone: a `VisionTransformer` with a class token.
        centering: "centering", by the moving centers, or "sinkhorn_knopp", three iterations on the step's class tokens
            of both crops, and on its masked patches.
        others: as in `IBOT`.

    cls is the mean over all 2 (V - 1) pairs of crops, the original's two terms by its divisor, 18 at V = 10.

    Source: facebookresearch/dinov2 `dinov2/train/ssl_meta_arch.py`, `dinov2/loss/`, `dinov2/data/{masking,collate}.py`,
    `dinov2/configs/ssl_default_config.yaml`.

    Example:
        >>> from sslkernels.data import multi_crop
        >>> method = DINOv2(VisionTransformer(), out_dim=1024, total_steps=1000)
        >>> crops = multi_crop(torch.rand(8, 3, 32, 32), local_size=16, scale=(0.5, 1.0), local_scale=(0.25, 0.5))
        >>> loss, metrics = method(crops)
    """

    center_by_all = False
    masks: Mapping[str, Any] = {"ratio": (0.1, 0.5), "probability": 0.5, "style": "dinov2"}

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        out_dim: int = 65536,
        head_options: Mapping[str, Any] | None = None,
        teacher_temp: float = 0.07,
        momentum: float = 0.992,
        centering: str = "centering",
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        **options: Any,
    ) -> None:
        check.choice("centering", centering, ("centering", "sinkhorn_knopp"))
        super().__init__(
            backbone,
            out_dim=out_dim,
            head_options={"norm_last_layer": False, **(head_options or {})},
            teacher_temp=teacher_temp,
            patch_temp=teacher_temp,
            momentum=momentum,
            center_mode="mean" if centering == "centering" else centering,
            **options,
        )
        self.loss_weights = (dino_weight, ibot_weight, koleo_weight)

    def forward(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(batch, self.mask(batch))
        apart = torch.stack(
            [koleo_loss(crop, process_group=self.process_group) for crop in terms.features.chunk(2)]
        ).sum()
        values = (terms.cls, terms.patch, apart)
        loss = sum((weight * value for weight, value in zip(self.loss_weights, values)), torch.zeros_like(apart))
        losses = {"loss": loss, **dict(zip(("cls_loss", "patch_loss", "koleo"), values))}
        return loss, {**{name: x.detach() for name, x in losses.items()}, **terms.metrics}
