# SPDX-License-Identifier: Apache-2.0
"""Encoders of speech: strided convolutions over the waveform, and a context over their frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.nn.transformer import TransformerBlock, init_linear

__all__ = ["ConvFeatureEncoder", "ConvPositionalEmbedding", "SpeechGRU", "SpeechTransformer", "scale_gradient"]

# (channels, kernel, stride) of each layer; their strides multiply to 320 and 160 samples, 20 and 10 ms at 16 kHz
WAV2VEC2_LAYERS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)
CPC_LAYERS = ((512, 10, 5), (512, 8, 4), *((512, 4, 2),) * 3)


class ConvFeatureEncoder(nn.Module):
    """Waveforms (B, 1, samples) or (B, samples) -> frames (B, T, channels of the last layer), as wav2vec 2.0.

    Convolutions without padding or bias, each followed by GELU; `norm="group"` normalizes each channel over time after
    the first one (wav2vec 2.0 base, HuBERT base), "layer" each frame after every one (their large models), "none"
    nothing.

    Example:
        >>> ConvFeatureEncoder()(torch.randn(2, 1, 16_000)).shape
        torch.Size([2, 49, 512])

    Source: fairseq `models/wav2vec/wav2vec2.py::ConvFeatureExtractionModel`.
    """

    def __init__(self, layers: Sequence[tuple[int, int, int]] = WAV2VEC2_LAYERS, *, norm: str = "group") -> None:
        super().__init__()
        if not layers or min(min(layer) for layer in layers) < 1:
            raise ValueError(f"layers must be (channels, kernel, stride) of each convolution, got {layers}")
        if norm not in ("group", "layer", "none"):
            raise ValueError(f'norm must be "group", "layer" or "none", got {norm!r}')
        self.layers, self.dim = tuple(layers), layers[-1][0]
        self.stride = math.prod(stride for _, _, stride in layers)  # samples from one frame to the next
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        width = 1
        for index, (channels, kernel, stride) in enumerate(layers):
            convolution = nn.Conv1d(width, channels, kernel, stride, bias=False)
            nn.init.kaiming_normal_(convolution.weight)
            self.convolutions.append(convolution)
            grouped = nn.GroupNorm(channels, channels) if norm == "group" and index == 0 else nn.Identity()
            self.norms.append(nn.LayerNorm(channels) if norm == "layer" else grouped)
            width = channels

    def frames(self, samples: int) -> int:
        """How many frames come of so many samples."""
        for _, kernel, stride in self.layers:
            samples = (samples - kernel) // stride + 1
        return max(samples, 0)

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None] if waveforms.ndim == 2 else waveforms
        if x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(f"waveforms must be (B, samples) or (B, 1, samples), got {tuple(waveforms.shape)}")
        if not self.frames(x.shape[-1]):
            raise ValueError(f"{x.shape[-1]} samples are too few for one frame")
        for convolution, norm in zip(self.convolutions, self.norms):
            x = convolution(x)
            x = norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(norm, nn.LayerNorm) else norm(x)
            x = F.gelu(x)
        return x.transpose(1, 2)


class ConvPositionalEmbedding(nn.Module):
    """What a frame's neighbourhood says of its place: a grouped convolution over time, with GELU, (B, T, dim) as given.

    The weight is normalized at each place of the kernel, over all channels; a frame sees `kernel` / 2 frames before it
    and, where the kernel is even, one less behind it.

    Source: fairseq `models/wav2vec/wav2vec2.py::make_conv_pos`.
    """

    def __init__(self, dim: int, *, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        convolution = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(convolution.weight, std=(4 / (kernel * dim)) ** 0.5)
        nn.init.zeros_(cast(Tensor, convolution.bias))
        self.convolution = nn.utils.parametrizations.weight_norm(convolution, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


class SpeechTransformer(nn.Module):
    """Waveforms (B, 1, samples) -> features (B, dim), the mean over time of a transformer's frames.

        features = encoder(waveforms), a layer norm          (B, T, encoder.dim)
        x = project(features)                                (B, T, dim), where a method puts its mask token
        context = norm(blocks(x + positions(x)))             (B, T, dim)

    Wav2vec 2.0's, but for the blocks, which are pre-norm, as in its large models. All waveforms of a batch have one
    length: crop them to it, as the original does.

    Example:
        >>> SpeechTransformer(ConvFeatureEncoder(), embed_dim=64, depth=2)(torch.randn(2, 1, 16_000)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        encoder: ConvFeatureEncoder,
        *,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel: int = 128,
        groups: int = 16,
        weight_init: str = "normal",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or embed_dim % groups:
            raise ValueError(f"embed_dim must be a multiple of {num_heads=} and of {groups=}, got {embed_dim}")
        self.dim = embed_dim
        self.encoder = encoder
        self.feature_norm = nn.LayerNorm(encoder.dim)
        self.project = nn.Linear(encoder.dim, embed_dim)
        self.positions = ConvPositionalEmbedding(embed_dim, kernel=kernel, groups=groups)
        self.blocks = nn.Sequential(*(TransformerBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        init_linear(self, weight_init)

    def forward_tokens(self, x: Tensor, *, depth: int | None = None) -> Tensor:
        """The context of projected frames (B, T, dim); with `depth`, what leaves that block, not normalized."""
        if depth is not None and not 1 <= depth <= len(self.blocks):
            raise ValueError(f"depth must be between 1 and the {len(self.blocks)} blocks, got {depth}")
        x = x + self.positions(x)
        if depth is not None:
            return self.blocks[:depth](x)
        return self.norm(self.blocks(x))

    def forward_features(self, waveforms: Tensor, *, depth: int | None = None) -> Tensor:
        """The context (B, T, dim) of whole waveforms."""
        return self.forward_tokens(self.project(self.feature_norm(self.encoder(waveforms))), depth=depth)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.forward_features(waveforms).mean(dim=1)


class SpeechGRU(nn.Module):
    """Waveforms (B, 1, samples) -> features (B, dim), the mean over time of what a GRU makes of the frames so far.

    Example:
        >>> SpeechGRU(ConvFeatureEncoder(CPC_LAYERS, norm="layer"), dim=256)(torch.randn(2, 1, 16_000)).shape
        torch.Size([2, 256])
    """

    def __init__(self, encoder: ConvFeatureEncoder, *, dim: int = 256) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = encoder
        self.gru = nn.GRU(encoder.dim, dim, batch_first=True)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.gru(self.encoder(waveforms))[0].mean(dim=1)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, through which a gradient passes multiplied by `factor`: how wav2vec 2.0 slows its convolutions down."""
    if factor in (0, 1):
        return x if factor else x.detach()
    return cast(Tensor, _ScaleGradient.apply(x, factor))
