# SPDX-License-Identifier: Apache-2.0
"""Small backbones and the projection head, for tests, demos and small data; any other `nn.Module` does as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ProjectionHead", "ResidualCNN", "VisionTransformer", "feature_dim"]


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


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, tokens (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, dim / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, dim)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A small ViT: images (B, in_chans, H, W) -> the class token after the last norm (B, dim).

    H and W may be any multiples of `patch_size` and differ from call to call: positions are the fixed 2D sine-cosine
    ones (MoCo v3, MAE), made for the grid at hand, so that no learned table ties the weights to one size.
    `forward_features` returns all tokens (B, 1 + H W / patch_size^2, dim), the class token first. Parameter names are
    timm's where the part is the same.

    Example:
        >>> VisionTransformer(in_chans=1, patch_size=2)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        patch_size: int = 4,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of num_heads, got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        self.dim = embed_dim
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.Sequential(*(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(f"image height and width must be multiples of {self.patch_size}, got {tuple(x.shape)}")
        x = self.patch_embed(x)
        positions = _sincos_positions(x.shape[-2], x.shape[-1], self.dim, x.device).to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2) + positions  # (B, L, dim)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 0]


def _sincos_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed positions (height * width, dim): a quarter each of sin y, cos y, sin x, cos x, wavelengths up to 10,000."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(dim // 4, device=device) / (dim // 4))
    y = torch.arange(height, device=device)[:, None, None] * frequency  # (H, 1, dim / 4)
    x = torch.arange(width, device=device)[None, :, None] * frequency  # (1, W, dim / 4)
    y, x = y.expand(height, width, -1), x.expand(height, width, -1)
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1).reshape(height * width, dim)


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
