# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for images and clips that embeds and attends only the patches it is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.ops import embed_patches, gather_tokens


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, tokens (B, L, dim) -> (B, L, dim).

    `mask` is bool and broadcast to (B, heads, L, L): where it is False, the row's token does not see the column's.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The first half of the block, with its residual."""
        b, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, dim / heads)
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, length, dim)
        return x + self.proj(attended)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half without its residual: what data2vec 2.0 predicts."""
        return self.mlp(self.norm2(x))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attend(x, mask)
        return x + self.feed_forward(x)


class VisionTransformer(nn.Module):
    """A small ViT: images (B, in_chans, H, W) -> features (B, dim): the class token after the last norm.

    With `patch_size=(t, p, q)` it takes clips (B, in_chans, T, H, W). The sides may be any multiples of the patch's
    and differ from call to call: positions are fixed sine-cosine ones, made for the grid at hand, so that no learned
    table ties the weights to one size. Without a class token the features are the mean of the patch tokens.

    Images are floating, or uint8 and then divided by 255. With `mean` and `std`, a value for each channel, they are
    normalized on their way into the patches: (x - mean) / std.

    `forward_features(x, ids)` embeds and attends the patches `ids` alone, at their own positions: a method that hides
    three quarters of an image pays for one. Parameter names are timm's where the part is the same.

    Example:
        >>> vit = VisionTransformer(in_chans=1, patch_size=2)
        >>> vit(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 128])
        >>> vit.forward_features(torch.rand(2, 1, 8, 8), torch.tensor([[0, 5, 9], [2, 3, 15]])).shape
        torch.Size([2, 4, 128])
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        patch_size: int | tuple[int, ...] = 4,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        weight_init: str = "normal",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of 4 and of num_heads, got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(self.patch_size) not in (2, 3) or min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be an int, (p, q) or, for clips, (t, p, q), got {patch_size}")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != in_chans:
                raise ValueError(f"{name} must have a value for each of the {in_chans} channels, got {values}")
        self.mean, self.std = mean, std
        self.dim = embed_dim
        self.num_prefix_tokens = int(class_token)
        convolution = nn.Conv2d if len(self.patch_size) == 2 else nn.Conv3d
        self.patch_embed = convolution(in_chans, embed_dim, self.patch_size, self.patch_size)  # type: ignore[arg-type]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.blocks = nn.Sequential(*(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_linear(self, weight_init)

    def grid(self, x: Tensor) -> tuple[int, ...]:
        """How many patches x has along each side: (H / p, W / q), or (T / t, H / p, W / q)."""
        sides, patch = tuple(x.shape[2:]), self.patch_size
        if len(sides) != len(patch) or any(side % size for side, size in zip(sides, patch)):
            multiples = f"{patch[0]}" if len(set(patch)) == 1 else f"{patch}"
            kind = "image height and width" if len(patch) == 2 else "clip frames, height and width"
            raise ValueError(f"{kind} must be multiples of {multiples}, got {tuple(x.shape)}")
        return tuple(side // size for side, size in zip(sides, patch))

    def positions(self, x: Tensor) -> Tensor:
        """Of all patches of x (L, dim), in the dtype of the weights."""
        return sincos_positions(self.grid(x), self.dim, device=x.device).to(self.patch_embed.weight.dtype)

    def embed(self, x: Tensor, ids: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """The patches `ids` (B, K), or all in row-major order, as tokens (B, K, dim); `position` (L, dim) is added."""
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        return embed_patches(x, ids, weight, bias, position, self.patch_size, mean=self.mean, std=self.std)

    def forward_tokens(self, tokens: Tensor, *, return_layers: int = 0) -> Any:
        """Class token, blocks and last norm over tokens (B, K, dim) that have their positions."""
        if not 0 <= return_layers <= len(self.blocks):
            raise ValueError(f"return_layers must be between 0 and the {len(self.blocks)} blocks, got {return_layers}")
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        if not return_layers:
            return self.norm(self.blocks(tokens))
        layers = []
        for block in cast(list[TransformerBlock], self.blocks):
            tokens = block.attend(tokens)
            layers.append(block.feed_forward(tokens))
            tokens = tokens + layers[-1]
        return self.norm(tokens), layers[-return_layers:]

    def forward_features(self, x: Tensor, ids: Tensor | None = None, *, return_layers: int = 0) -> Any:
        """All tokens after the last norm (B, num_prefix_tokens + K, dim), the class token first.

        ids (B, K) are the patches to take, counted in row-major order over `grid(x)`; None takes all. With ids
        (B, M, K), M masks of each image, every image is embedded once and the result has B M rows, image-major.
        With `return_layers=K` the result is a pair: the tokens, and what the MLPs of the last K blocks add to the
        residual, a list of K tensors of the tokens' shape.
        """
        if ids is not None and ids.ndim == 3:
            tokens = gather_tokens(self.embed(x, None, self.positions(x)), ids).flatten(0, 1)
        else:
            tokens = self.embed(x, ids, self.positions(x))
        return self.forward_tokens(tokens, return_layers=return_layers)

    def pool(self, tokens: Tensor) -> Tensor:
        """Features (B, dim) of tokens from `forward_features`: the class token, or the mean where there is none."""
        return tokens[:, 0] if self.cls_token is not None else tokens.mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.forward_features(x))


def init_linear(module: nn.Module, weight_init: str) -> None:
    """Weights of linear layers "normal", of standard deviation 0.02 and cut at 2 (BEiT, the JEPAs), or uniform after
    "glorot" (MAE), which is wider the narrower the network is; biases zero."""
    if weight_init not in ("normal", "glorot"):
        raise ValueError(f'weight_init must be "normal" or "glorot", got {weight_init!r}')
    for part in module.modules():
        if isinstance(part, nn.Linear):
            if weight_init == "normal":
                nn.init.trunc_normal_(part.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def sincos_positions(grid: Sequence[int], dim: int, *, device: torch.device | str | None = None) -> Tensor:
    """Fixed positions (product of grid, dim): sin and cos of each coordinate, wavelengths 2 pi to 20,000 pi.

    Each of the n axes has 2 ceil(dim / 2n) columns, the sines first, and what is beyond `dim` is cut off: quarters in
    two dimensions, as MoCo v3 and MAE have them, and V-JEPA's `uniform_power` in three.
    """
    half = math.ceil(dim / (2 * len(grid)))
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=device) / half)
    columns = []
    for axis, size in enumerate(grid):
        angle = torch.arange(size, device=device)[:, None] * frequency  # (size, half)
        shape = [size if other == axis else 1 for other in range(len(grid))]
        angle = angle.reshape(*shape, half).expand(*grid, half)
        columns += [angle.sin(), angle.cos()]
    return torch.cat(columns, dim=-1).reshape(-1, 2 * half * len(grid))[:, :dim]
