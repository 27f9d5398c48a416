# SPDX-License-Identifier: Apache-2.0
"""What fills in what an encoder did not see: MAE's decoder, data2vec's, and the predictor of the JEPAs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.nn.transformer import TransformerBlock, init_linear, sincos_positions
from sslkernels.ops import gather_tokens, restore_tokens


class MaskedDecoder(nn.Module):
    """Tokens of the visible patches -> (B, K, out_dim), one row for each patch asked for.

        x = embed(tokens) at the visible places, mask_token elsewhere, all plus fixed positions
        x = head(norm(blocks(x)[wanted]))

    tokens (B, P + K, in_dim) are an encoder's, with `num_prefix_tokens` P tokens (the class token) ahead, which take
    part and get no position. `grid` is the patch grid, `wanted` (B, M) the patches to decode, None for all: the norm
    and the head run on these alone.

    Source: facebookresearch/mae `models_mae.py::forward_decoder`; MCG-NJU/VideoMAE `modeling_pretrain.py`, whose first
    layer has no bias.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_prefix_tokens: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, embed_dim, bias=bias)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.Sequential(*(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, out_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        init_linear(self, "glorot")

    def forward(self, tokens: Tensor, visible: Tensor, grid: Sequence[int], wanted: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        prefix = self.num_prefix_tokens
        positions = sincos_positions(grid, x.shape[-1], device=x.device).to(x.dtype)
        if prefix:
            positions = torch.cat([positions.new_zeros(prefix, x.shape[-1]), positions])
        x = restore_tokens(x, visible, self.mask_token, positions, num_prefix_tokens=prefix)
        x = self.blocks(x)
        x = x[:, prefix:] if wanted is None else gather_tokens(x, wanted + prefix)
        return self.head(self.norm(x))


class Predictor(nn.Module):
    """Tokens of the context patches -> predicted tokens of the target patches, block by block.

        x = embed(context) + positions[context_ids]                         (B, K, embed_dim), narrower than in_dim
        y = mask_tokens[mask] + positions[target_ids[m]]                    for each block m of targets on its own
        prediction[m] = project(norm(blocks(cat(x, y))[y's places]))

    context (B, K, in_dim), context_ids (B, K); target_ids (B, T) -> (B, T, out_dim), or M blocks (B, M, T) ->
    (B, M, T, out_dim), where no block sees another. `mask` chooses one of `num_mask_tokens` learned tokens.

    Source: facebookresearch/ijepa `src/models/vision_transformer.py::VisionTransformerPredictor`,
    facebookresearch/jepa `src/models/predictor.py`.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        out_dim: int | None = None,
        embed_dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_mask_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_tokens = nn.Parameter(torch.zeros(num_mask_tokens, embed_dim))
        self.blocks = nn.Sequential(*(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.project = nn.Linear(embed_dim, out_dim or in_dim)
        nn.init.trunc_normal_(self.mask_tokens, std=0.02)
        init_linear(self, "normal")

    def forward(
        self, context: Tensor, context_ids: Tensor, target_ids: Tensor, grid: Sequence[int], *, mask: int = 0
    ) -> Tensor:
        x = self.embed(context)
        positions = sincos_positions(grid, x.shape[-1], device=x.device).to(x.dtype)
        x = x + gather_tokens(positions, context_ids)
        blocks = target_ids if target_ids.ndim == 3 else target_ids[:, None]  # (B, M, T)
        x = x.repeat_interleave(blocks.shape[1], dim=0)
        y = self.mask_tokens[mask].to(x.dtype) + gather_tokens(positions, blocks.flatten(0, 1))
        y = self.blocks(torch.cat([x, y], dim=1))[:, x.shape[1] :]
        return self.project(self.norm(y)).unflatten(0, blocks.shape[:2]).reshape(*target_ids.shape, -1)


class ConvolutionalDecoder(nn.Module):
    """Tokens (N, L, dim) on a grid (h, w) -> the tokens ids (N, K) of the grid after convolutions, (N, K, dim).

    `depth` times x <- x + gelu(layer_norm(conv(x))), 3x3 in groups, the norm without affine; then a linear layer, which
    runs on the tokens asked for alone. Defaults are the original's for images.

    Source: facebookresearch/fairseq `examples/data2vec/models/modalities/modules.py::Decoder2d`.
    """

    def __init__(self, dim: int, *, depth: int = 6, groups: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=groups) for _ in range(depth))
        self.project = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int], ids: Tensor) -> Tensor:
        x = tokens.unflatten(1, grid)  # (N, h, w, C), which a convolution reads as channels_last
        for conv in self.blocks:
            y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = x + F.gelu(F.layer_norm(y, y.shape[-1:]))
        return self.project(gather_tokens(x.flatten(1, 2), ids))
