# SPDX-License-Identifier: Apache-2.0
"""What wav2vec 2.0 and HuBERT share: spans of frames are hidden from a transformer that hears the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.methods._method import Method
from sslkernels.nn import SpeechTransformer
from sslkernels.nn.speech import scale_gradient
from sslkernels.ops import span_mask


class Heard(NamedTuple):
    features: Tensor  # (B, T, encoder.dim), normalized, nothing hidden
    mask: Tensor  # (B, T), True where hidden
    context: Tensor  # (B, T, dim)
    penalty: Tensor  # the mean square of the features before their norm


class MaskedSpeech(Method):
    def __init__(
        self,
        backbone: SpeechTransformer,
        *,
        mask_ratio: float,
        mask_length: int,
        feature_grad_mult: float,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        check.ratio("mask_ratio", mask_ratio)
        check.integer("mask_length", mask_length, 1)
        if not 0 <= feature_grad_mult <= 1:
            raise ValueError(f"feature_grad_mult must be in [0, 1], got {feature_grad_mult}")
        self.backbone = backbone
        self.mask_ratio, self.mask_length, self.feature_grad_mult = mask_ratio, mask_length, feature_grad_mult
        self.mask_token = nn.Parameter(torch.empty(backbone.dim).uniform_())

    def mask(self, batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """(batch, length) bool, True where hidden, drawn for each waveform."""
        device = self.mask_token.device
        return span_mask(batch, length, self.mask_ratio, self.mask_length, device=device, generator=generator)

    def hear(self, waveforms: Tensor, generator: torch.Generator | None = None) -> Heard:
        """The convolutions' frames, and the context of those that are not hidden."""
        raw = scale_gradient(self.backbone.encoder(waveforms), self.feature_grad_mult)
        penalty = raw.to(torch.promote_types(raw.dtype, torch.float32)).square().mean()
        features = self.backbone.feature_norm(raw)
        mask = self.draw(features, lambda rows: self.mask(rows, features.shape[1], generator))
        x = self.backbone.project(features)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        return Heard(features, mask, self.backbone.forward_tokens(x), penalty)

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
