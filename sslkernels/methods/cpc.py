# SPDX-License-Identifier: Apache-2.0
"""CPC: what a GRU has heard so far names the frames that follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import CPCLoss
from sslkernels.methods._method import Method
from sslkernels.nn import SpeechGRU


class CPC(Method):
    """van den Oord et al. 2018, for speech. batch = waveforms (B, 1, samples), cropped to one length.

        z = encoder(waveforms)                                  (B, T, D)
        c = gru(z)                                              (B, T, C), c_t of z_1 to z_t
        loss = mean over k = 1 to `steps` and over t of -log exp(z_(t+k) . W_k c_t) / sum_j exp(z_j . W_k c_t)

    j runs over all frames of the batch, or with `negatives="sequence"` over those of the same waveform. Scores are
    plain products, without norm or temperature. An encoder whose norm looks at the whole waveform (`norm="group"`)
    would tell of the frames that follow, and is refused: take "layer" or "none". Features are the mean over time of c.

    `metrics["top1"]`: how often the frame is ahead of all others, the mean over the steps.

    Source: arXiv:1807.03748, sections 2 and 3.1; the original code is not public.

    Example:
        >>> from sslkernels.nn.speech import CPC_LAYERS
        >>> method = CPC(SpeechGRU(ConvFeatureEncoder(CPC_LAYERS, norm="layer")))
        >>> loss, metrics = method(torch.randn(2, 1, 20_480))
    """

    def __init__(
        self, backbone: SpeechGRU, *, steps: int = 12, negatives: str = "batch", process_group: Any = None
    ) -> None:
        super().__init__(process_group)
        if any(isinstance(part, nn.GroupNorm) for part in backbone.encoder.modules()):
            raise ValueError(
                'backbone.encoder must have norm="layer" or "none", got "group": a norm over time tells of the frames '
                "that follow"
            )
        self.backbone = backbone
        self.criterion = CPCLoss(
            backbone.dim, backbone.encoder.dim, steps, negatives=negatives, process_group=process_group
        )

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.backbone.encoder(batch)
        loss, stats = self.criterion(self.backbone.gru(z)[0], z, return_stats=True)
        return loss, {"loss": loss.detach(), **{name: value.mean() for name, value in stats.items()}}

    @torch.no_grad()
    def pretext_accuracy(self, waveforms: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """How often the frame that follows is ahead of all others. Nothing is drawn: `generator` is not used."""
        return self(waveforms)[1]["top1"]

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
