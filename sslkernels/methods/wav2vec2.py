# SPDX-License-Identifier: Apache-2.0
"""wav2vec 2.0: tell which code a hidden frame of a waveform has, among those of other frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import Wav2Vec2Loss
from sslkernels.methods._speech import MaskedSpeech
from sslkernels.nn import GumbelVectorQuantizer, SpeechTransformer


class Wav2Vec2(MaskedSpeech):
    """Baevski et al. 2020. batch = waveforms (B, 1, samples), cropped to one length.

        features = norm(encoder(waveforms))                                 (B, T, encoder.dim)
        q = project_q(quantizer(features))                                  (B, T, dim), nothing hidden
        c = final_proj(transformer(project(features), a learned vector in place of the masked spans))
        loss = mean over masked frames of CE(cos(c_t, {q_t, distractors}) / temperature, q_t)
               + diversity_weight * (1 - perplexity of the mean code probabilities / G V)
               + penalty_weight * mean(encoder(waveforms)^2)

    The distractors are other masked frames of the same waveform, but those of the same codes. The gradient that reaches
    the convolutions is multiplied by `feature_grad_mult`. `after_step` cools the quantizer: its temperature is
    max(quantizer_temp[0] * quantizer_temp[2]^updates, quantizer_temp[1]). Features are the mean over time of the last
    block, normalized.

    `metrics["code_perplexity"]`, the number of codes in use summed over the groups, tells a codebook that collapses: it
    goes to the number of groups; `top1` is the share of the masked frames whose code is ahead of its distractors.

    Source: fairseq `models/wav2vec/wav2vec2.py`, `criterions/wav2vec_criterion.py`,
    `examples/wav2vec/config/pretraining/wav2vec2_base_librispeech.yaml`.

    Example:
        >>> backbone = SpeechTransformer(ConvFeatureEncoder(), embed_dim=64, depth=2, num_heads=4)
        >>> loss, metrics = Wav2Vec2(backbone)(torch.randn(2, 1, 16_000))
    """

    def __init__(
        self,
        backbone: SpeechTransformer,
        *,
        dim: int = 256,
        num_vars: int = 320,
        groups: int = 2,
        quantizer_temp: tuple[float, float, float] = (2.0, 0.5, 0.999995),
        num_negatives: int = 100,
        temperature: float = 0.1,
        mask_ratio: float = 0.65,
        mask_length: int = 10,
        feature_grad_mult: float = 0.1,
        diversity_weight: float = 0.1,
        penalty_weight: float = 10.0,
        process_group: Any = None,
    ) -> None:
        options: dict[str, Any] = {"mask_ratio": mask_ratio, "mask_length": mask_length}
        super().__init__(backbone, feature_grad_mult=feature_grad_mult, process_group=process_group, **options)
        self.quantizer = GumbelVectorQuantizer(backbone.encoder.dim, num_vars, quantizer_temp, groups, vq_dim=dim)
        self.project_q = nn.Linear(dim, dim)
        self.final_proj = nn.Linear(backbone.dim, dim)
        weights = diversity_weight, penalty_weight
        self.criterion = Wav2Vec2Loss(num_negatives, temperature, *weights, process_group=process_group)
        self.updates = 0

    def forward(self, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        heard = self.hear(batch, generator)
        codes = self.quantizer(heard.features, heard.mask, generator=generator)
        loss, stats = self.criterion(
            self.final_proj(heard.context),
            self.project_q(codes.x),
            heard.mask,
            codes.probabilities,
            heard.penalty,
            ids=codes.ids,
            generator=generator,
            return_stats=True,
        )
        return loss, {"loss": loss.detach(), **stats, "code_perplexity": codes.code_perplexity}

    @torch.no_grad()
    def pretext_accuracy(self, waveforms: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Share of the masked frames whose code is ahead of its distractors."""
        return self(waveforms, generator=generator)[1]["top1"]

    def after_step(self, step: int) -> None:
        """Cool the quantizer."""
        self._set_updates(step + 1)

    def _set_updates(self, updates: int) -> None:
        self.updates = updates
        self.quantizer.set_num_updates(updates)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        self._set_updates(int(state))
