# SPDX-License-Identifier: Apache-2.0
"""SigLIP: every image-text pair of the batch is its own yes-or-no question."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import SigLipLoss
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim


class SigLIP(Method):
    """Zhai et al. 2023. batch = (images, texts): what the two encoders take, B of each, paired by position.

        i, t = unit(image_encoder(images) @ Wi), unit(text_encoder(texts) @ Wt)      x / (|x| + 1e-8)
        loss = sum over all pairs of softplus(-m * (s * i @ t.T + b)) / B,  m = 1 on the diagonal, else -1

    s = exp(logit_scale) is learned from 10 and b = logit_bias from -10, so that the first steps are not spent on the
    B^2 - B negatives; neither is clamped.

    Source: google-research/big_vision `trainers/proj/image_text/siglip.py::loss_fn`,
    `models/proj/image_text/two_towers.py`; the two starting values are the paper's.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = SigLIP(ResidualCNN(in_chans=1), nn.EmbeddingBag(100, 64))
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.randint(100, (8, 5))))
    """

    def __init__(
        self, image_encoder: nn.Module, text_encoder: nn.Module, *, dim: int = 512, process_group: Any = None
    ) -> None:
        super().__init__(process_group)
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.image_projection = nn.Linear(feature_dim(image_encoder), dim)
        self.text_projection = nn.Linear(feature_dim(text_encoder), dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.criterion = SigLipLoss(process_group=process_group)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, dim)."""
        features = self.image_projection(self.image_encoder(images))
        return features / (features.norm(dim=1, keepdim=True) + 1e-8)

    def encode_text(self, texts: Tensor) -> Tensor:
        """Unit embeddings (B, dim)."""
        features = self.text_projection(self.text_encoder(texts))
        return features / (features.norm(dim=1, keepdim=True) + 1e-8)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts = batch
        scale = self.logit_scale.exp()
        image, text = self.encode_image(images), self.encode_text(texts)
        loss, stats = self.criterion(image, text, scale, self.logit_bias, return_stats=True)
        metrics = {"loss": loss.detach(), "scale": scale.detach(), "bias": self.logit_bias.detach().clone()}
        return loss, {**metrics, **stats}

    def encode(self, x: Tensor) -> Tensor:
        return self.image_encoder(x)
