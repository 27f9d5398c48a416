# SPDX-License-Identifier: Apache-2.0
"""Discrete tokens of images, for methods that predict them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslkernels.clustering import kmeans
from sslkernels.ops import gather_patches, nearest


class PatchTokenizer(nn.Module):
    """Images (B, C, H, W) -> a code for each patch (B, L), int64, in row-major order: the nearest of the centroids.

    It stands in for BEiT's tokenizer, the discrete VAE of DALL-E, whose weights no package ships: that one sees beyond
    its patch and was trained to give the image back, this one clusters pixels.

    Args:
        centroids: (V, P), patches of P values in channels-last order.
        patch_size: (p, q).

    Example:
        >>> images = torch.rand(64, 3, 32, 32)
        >>> tokenizer = PatchTokenizer.fit(images, 16, patch_size=4)
        >>> tokenizer(images).shape
        torch.Size([64, 64])
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, patch_size: int | Sequence[int]) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        self.register_buffer("centroids", centroids.clone())

    @classmethod
    def fit(
        cls, images: Tensor, num_codes: int, *, patch_size: int | Sequence[int], iterations: int = 20, seed: int = 0
    ) -> PatchTokenizer:
        """The k-means centroids of all patches of float images (N, C, H, W)."""
        tokenizer = cls(torch.empty(0), patch_size)
        tokenizer.centroids = kmeans(tokenizer.patches(images), num_codes, iterations=iterations, seed=seed).centroids
        return tokenizer

    @property
    def num_codes(self) -> int:
        return len(self.centroids)

    def patches(self, images: Tensor) -> Tensor:
        """All patches of the images (B L, P)."""
        return gather_patches(images, None, self.patch_size, channels_last=True).flatten(0, 1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        codes = nearest(self.patches(images), self.centroids)[1]
        return codes.view(len(images), -1)
