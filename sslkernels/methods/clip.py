# SPDX-License-Identifier: Apache-2.0
"""CLIP: an image and its text find each other in the batch, in both directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import ClipLoss, clamp_logit_scale_
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim


class CLIP(Method):
    """Radford et al. 2021. batch = (images, texts): what the two encoders take, B of each, paired by position.

        i, t = unit(image_encoder(images) @ Wi), unit(text_encoder(texts) @ Wt)      x / |x|, no epsilon
        loss = (cross_entropy(s * i @ t.T, arange) + cross_entropy(s * t @ i.T, arange)) / 2,  s = exp(logit_scale)

    `logit_scale` is learned from ln(1 / 0.07) and put back into [0, ln 100] after each optimizer step, never inside
    the forward, where a clamp would take its gradient away.

    Source: openai/CLIP `clip/model.py`; mlfoundations/open_clip `src/open_clip/loss.py::ClipLoss`,
    `src/open_clip_train/train.py` for the clamp.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = CLIP(ResidualCNN(in_chans=1), nn.EmbeddingBag(100, 64))
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.randint(100, (8, 5))))
    """

    def __init__(
        self, image_encoder: nn.Module, text_encoder: nn.Module, *, dim: int = 512, process_group: Any = None
    ) -> None:
        super().__init__(process_group)
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.image_projection = nn.Linear(feature_dim(image_encoder), dim, bias=False)
        self.text_projection = nn.Linear(feature_dim(text_encoder), dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.criterion = ClipLoss(process_group=process_group)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, dim)."""
        features = self.image_projection(self.image_encoder(images))
        return features / features.norm(dim=1, keepdim=True)

    def encode_text(self, texts: Tensor) -> Tensor:
        """Unit embeddings (B, dim)."""
        features = self.text_projection(self.text_encoder(texts))
        return features / features.norm(dim=1, keepdim=True)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts = batch
        scale = self.logit_scale.exp()
        loss, stats = self.criterion(self.encode_image(images), self.encode_text(texts), scale, return_stats=True)
        return loss, {"loss": loss.detach(), "scale": scale.detach(), **stats}

    def after_step(self, step: int) -> None:
        """Clamp the logit scale in place."""
        clamp_logit_scale_(self.logit_scale)

    def encode(self, x: Tensor) -> Tensor:
        return self.image_encoder(x)
