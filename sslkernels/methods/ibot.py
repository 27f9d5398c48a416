# SPDX-License-Identifier: Apache-2.0
"""iBOT: DINO, and the masked patches of the student agree with what the teacher makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sslkernels.losses import IBOTPatchLoss
from sslkernels.methods._distillation import check_crops, rows_of_crops
from sslkernels.methods.dino import DINO
from sslkernels.nn import VisionTransformer
from sslkernels.ops import block_mask


class Terms(NamedTuple):
    """One step's losses, before they are added."""

    cls: Tensor
    patch: Tensor
    features: Tensor  # the student's class tokens of the global crops (2B, dim), before the head
    metrics: dict[str, Tensor]


class IBOT(DINO):
    """Zhou et al. 2022. batch = crops, a list: two global ones, then any number of local ones, each (B, C, H, W).

        student  = tokens of all crops; in the global ones, a learned token stands at masked patches
        teacher  = tokens of the global crops, unmasked; no gradient
        cls      = DINO's loss of the class tokens
        patch    = mean over the 2 B global crops of the mean over its masked patches of CE(teacher's, student's)
        loss     = cls + patch                          a crop without masked patches adds zero to patch
        centers <- as in `DINO`: one by class tokens, one by all of the teacher's patches, masked or not

    The head is one for class tokens and patches, as in the paper's runs (`--shared_head true`). The teacher's
    temperature for patches goes from `warmup_teacher_temp` to `patch_temp` over `warmup_teacher_temp_steps`. Masks are
    `block_mask(2B, grid, (0.1, 0.5), probability=0.5, style="ibot")`; the student's masked patches alone pass its head,
    and the teacher's center comes from the mean bottleneck, so that no logits of visible patches are made.

    Args:
        backbone: a `VisionTransformer` with a class token.
        mask_options: of `block_mask`.
        others: as in `DINO`.

    Source: bytedance/ibot `main_ibot.py`, `loader.py::ImageFolderMask`, `models/head.py`, and README.md for the head.

    Example:
        >>> from sslkernels.data import multi_crop
        >>> method = IBOT(VisionTransformer(), out_dim=1024, total_steps=1000)
        >>> crops = multi_crop(torch.rand(8, 3, 32, 32), local_size=16, scale=(0.5, 1.0), local_scale=(0.25, 0.5))
        >>> loss, metrics = method(crops)
    """

    center_by_all = True  # of the teacher's patches, not by the masked ones alone
    masks: Mapping[str, Any] = {"ratio": (0.1, 0.5), "probability": 0.5, "style": "ibot"}

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        out_dim: int = 8192,
        patch_temp: float = 0.07,
        warmup_teacher_temp_steps: int = 0,
        mask_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if backbone.num_prefix_tokens != 1:
            raise ValueError("the backbone must have a class token: VisionTransformer(class_token=True)")
        super().__init__(backbone, out_dim=out_dim, warmup_teacher_temp_steps=warmup_teacher_temp_steps, **options)
        self.patch_temps = (self.teacher_temps[0], patch_temp, warmup_teacher_temp_steps)
        self.mask_options = {**self.masks, **(mask_options or {})}
        self.mask_token = nn.Parameter(torch.zeros(backbone.dim))
        options = {name: getattr(self.criterion, name) for name in ("student_temp", "center_mode", "center_momentum")}
        options["process_group"] = self.process_group
        self.patch_criterion = IBOTPatchLoss(out_dim, **options)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def mask(self, batch: Sequence[Tensor], **options: Any) -> Tensor:
        """Random places (2B, h, w) bool, True where hidden; on the CPU, so that counting them waits for no device."""
        grid = cast(VisionTransformer, self.backbone).grid(batch[0])

        def draw(rows: int) -> Tensor:  # (rows, 2, h, w)
            mask = block_mask(2 * rows, grid, **{**self.mask_options, **options})
            return mask.unflatten(0, (2, rows)).transpose(0, 1)

        return self.draw(batch[0], draw).transpose(0, 1).flatten(0, 1)

    def masked_tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        """The student's tokens (2B, 1 + L, dim) of images whose masked patches it does not see."""
        backbone = cast(VisionTransformer, self.backbone)
        tokens = backbone.embed(images)
        tokens = torch.where(mask.flatten(1)[..., None].to(tokens.device), self.mask_token.to(tokens.dtype), tokens)
        return backbone.forward_tokens(tokens + backbone.positions(images))

    def terms(self, batch: Sequence[Tensor], mask: Tensor) -> Terms:
        """The losses of crops whose global ones are hidden at mask (2B, h, w)."""
        check_crops(batch)
        head, teacher_head = self.heads
        weights, images, size = self.weights(), torch.cat(list(batch[:2])), len(batch[0])
        places = token_places(mask).to(images.device, non_blocking=True)
        split = [2 * size, len(places)]

        with torch.no_grad():
            tokens = cast(VisionTransformer, self.teacher_backbone).forward_features(images)
            center_mean = None
            if self.center_by_all and self.patch_criterion.center_mode == "mean":
                z = teacher_head.bottleneck(tokens)
                center_mean = weights[1] @ z[:, 1:].mean(dim=(0, 1))  # the mean of the logits, as the layer is linear
                teacher, teacher_patches = z[:, 0], z.flatten(0, 1).index_select(0, places)
            else:
                rows = [tokens[:, 0], tokens.flatten(0, 1).index_select(0, places)]
                teacher, teacher_patches = teacher_head.bottleneck(torch.cat(rows)).split(split)

        tokens = self.masked_tokens(images, mask)
        rows = [tokens[:, 0], *rows_of_crops(self.backbone, batch[2:]), tokens.flatten(0, 1).index_select(0, places)]
        student, patches = head.bottleneck(torch.cat(rows)).split([len(batch) * size, len(places)])
        loss, metrics = self.class_loss(teacher, student, weights, size)
        patch_loss = self.patch_criterion(
            **self.outputs(teacher_patches, patches, weights),
            mask=mask.to(images.device, non_blocking=True),
            teacher_temp=self.temperature(*self.patch_temps),
            center_mean=center_mean,
        )
        return Terms(loss, patch_loss, rows[0], metrics)

    def forward(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(batch, self.mask(batch))
        loss = terms.cls + terms.patch
        losses = {"loss": loss, "cls_loss": terms.cls, "patch_loss": terms.patch}
        return loss, {**{name: x.detach() for name, x in losses.items()}, **terms.metrics}


def token_places(mask: Tensor) -> Tensor:
    """Where the masked patches of mask (N, h, w) lie among all tokens (N (1 + h w)), a class token ahead of each N."""
    image, place = mask.flatten(1).nonzero(as_tuple=True)
    return image * (1 + mask[0].numel()) + 1 + place
