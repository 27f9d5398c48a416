# SPDX-License-Identifier: Apache-2.0
"""A small transformer for token ids, with segments and padding as BERT's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslkernels.nn.transformer import TransformerBlock, init_linear


class TextTransformer(nn.Module):
    """Token ids (B, L) -> features (B, dim): the mean of the tokens after the last norm, padding left out.

        x = norm(token_embed[ids] + position_embed[0:L] + segment_embed[segments])
        x = norm(blocks(x))                                     no token sees padding

    The embeddings are BERT's, all learned; the blocks are pre-norm, where BERT's norm follows each residual, which
    needs a longer warm-up. With `pool="first"` the features are the first token, [CLS]. The first token of a row is
    never taken for padding. `weight_init="glorot"` has wider embeddings too, of about unit length: in a narrow network
    those of deviation 0.02 soon all point where the frequent tokens are.

    Example:
        >>> encoder = TextTransformer(1000, max_length=64)
        >>> encoder(torch.randint(1, 1000, (2, 16))).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        max_length: int = 512,
        num_segments: int = 2,
        pad_token: int = 0,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        pool: str = "mean",
        weight_init: str = "normal",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim=}, {num_heads=}")
        if pool not in ("mean", "first"):
            raise ValueError(f'pool must be "mean" or "first", got {pool!r}')
        self.dim, self.pad_token, self.pooling = embed_dim, pad_token, pool
        self.token_embed = nn.Embedding(vocab_size, embed_dim)
        self.position_embed = nn.Embedding(max_length, embed_dim)
        self.segment_embed = nn.Embedding(num_segments, embed_dim)
        self.embed_norm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_linear(self, weight_init)
        for part in (self.token_embed, self.position_embed, self.segment_embed):
            nn.init.trunc_normal_(part.weight, std=0.02 if weight_init == "normal" else embed_dim**-0.5)

    def valid(self, tokens: Tensor) -> Tensor:
        """Where tokens (B, L) are no padding, bool."""
        valid = tokens != self.pad_token
        valid[:, 0] = True
        return valid

    def forward_features(self, tokens: Tensor, segments: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """All tokens after the last norm (B, L, dim).

        segments (B, L) are 0 where not given; `valid` (B, L), bool, is what is no padding, `valid(tokens)` where not
        given.
        """
        length, longest = tokens.shape[1], self.position_embed.num_embeddings
        if length > longest:
            raise ValueError(f"tokens must be at most {longest} long, got {tuple(tokens.shape)}")
        segment = self.segment_embed.weight[0] if segments is None else self.segment_embed(segments)
        x = self.embed_norm(self.token_embed(tokens) + self.position_embed.weight[:length] + segment)
        valid = self.valid(tokens) if valid is None else valid
        mask = valid[:, None, None]  # one row for all queries of all heads
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        x = self.forward_features(tokens, segments)
        if self.pooling == "first":
            return x[:, 0]
        valid = self.valid(tokens)[..., None]
        return torch.where(valid, x, 0).sum(dim=1) / valid.sum(dim=1)
