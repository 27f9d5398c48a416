# SPDX-License-Identifier: Apache-2.0
"""HuBERT: name the clusters that the hidden frames of a waveform belong to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.clustering import kmeans
from sslkernels.losses import hubert_loss
from sslkernels.losses._common import IGNORE
from sslkernels.methods._speech import MaskedSpeech
from sslkernels.nn import SpeechTransformer
from sslkernels.ops import nearest
from sslkernels.speech import mfcc

MFCC_STRIDE = 160  # samples


class HuBERT(MaskedSpeech):
    """Hsu et al. 2021. batch = waveforms (B, 1, samples), cropped to one length.

        features = norm(encoder(waveforms))                                 (B, T, encoder.dim)
        context = transformer(project(features), a learned vector in place of the masked spans)
        loss = mean over masked frames of CE(cos(final_proj(context), label_embeddings) / temperature, label)
               + penalty_weight * mean(encoder(waveforms)^2)

    `labels` are the ids that k-means gives to frames of the waveform: of its MFCCs in the first training
    (`ClusterLabels.fit(waveforms, num_classes)`), of what a block of the trained network says in the second
    (`method.cluster(waveforms, num_classes, depth=6)`, for a new method). Any other callable does: waveforms to ids (B,
    T'), one every `label_stride` samples, by default the callable's `stride`, or 160. A frame takes the label that
    begins where it begins; frames after the last label are not asked. The gradient that reaches the convolutions is
    multiplied by `feature_grad_mult`.

    Features are the mean over time of the last block, normalized.

    Source: fairseq `models/hubert/hubert.py`, `criterions/hubert_criterion.py`,
    `examples/hubert/config/pretrain/hubert_base_librispeech.yaml`.

    Example:
        >>> waveforms = torch.randn(2, 1, 16_000)
        >>> backbone = SpeechTransformer(ConvFeatureEncoder(), embed_dim=64, depth=2, num_heads=4)
        >>> method = HuBERT(backbone, ClusterLabels.fit(waveforms, 8), 8)
        >>> loss, metrics = method(waveforms)
    """

    def __init__(
        self,
        backbone: SpeechTransformer,
        labels: Callable[[Tensor], Tensor],
        num_classes: int,
        *,
        label_stride: int | None = None,
        dim: int = 256,
        temperature: float = 0.1,
        mask_ratio: float = 0.8,
        mask_length: int = 10,
        feature_grad_mult: float = 0.1,
        pred_nomask_weight: float = 0.0,
        penalty_weight: float = 10.0,
        process_group: Any = None,
    ) -> None:
        options: dict[str, Any] = {"mask_ratio": mask_ratio, "mask_length": mask_length}
        super().__init__(backbone, feature_grad_mult=feature_grad_mult, process_group=process_group, **options)
        check.integer("num_classes", num_classes, 2)
        label_stride = getattr(labels, "stride", MFCC_STRIDE) if label_stride is None else label_stride
        check.integer("label_stride", label_stride, 1)
        check.positive("temperature", temperature)
        check.in_range("penalty_weight", penalty_weight, 0.0, math.inf)
        self.labels, self.label_stride = labels, label_stride
        self.pred_nomask_weight, self.penalty_weight = pred_nomask_weight, penalty_weight
        self.temperature = temperature
        self.final_proj = nn.Linear(backbone.dim, dim)
        self.label_embeddings = nn.Parameter(torch.empty(num_classes, dim).uniform_())

    @torch.no_grad()
    def targets(self, waveforms: Tensor, frames: int) -> Tensor:
        """The label of each frame (B, frames), -100 after the last one."""
        ids = self.labels(waveforms)
        place = torch.arange(frames, device=ids.device) * self.backbone.encoder.stride // self.label_stride
        taken = ids[:, place.clamp_max(ids.shape[1] - 1)]
        return torch.where(place < ids.shape[1], taken, IGNORE)

    def forward(self, batch: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        heard = self.hear(batch, generator)
        labels = self.targets(batch, heard.mask.shape[1])
        x = self.final_proj(heard.context)
        masked = hubert_loss(
            x,
            self.label_embeddings,
            labels,
            heard.mask,
            pred_nomask_weight=self.pred_nomask_weight,
            temperature=self.temperature,
            process_group=self.process_group,
        )
        loss = masked + self.penalty_weight * self.whole(batch).weigh(heard.penalty)
        return loss, {"loss": loss.detach(), "masked": masked.detach(), "penalty": heard.penalty.detach()}

    @torch.no_grad()
    def pretext_accuracy(self, waveforms: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Share of the masked frames whose label is the nearest."""
        heard = self.hear(waveforms, generator)
        labels = self.targets(waveforms, heard.mask.shape[1])
        asked = heard.mask & (labels != IGNORE)
        named = nearest(self.final_proj(heard.context[asked]), self.label_embeddings, metric="cosine")[1]
        return (named == labels[asked]).float().mean()

    def cluster(self, waveforms: Tensor, num_classes: int, *, depth: int, seed: int = 0) -> ClusterLabels:
        """Labels for a second training: clusters of what leaves block `depth` of a copy of this network."""
        features, stride = _Block(self.backbone, depth), self.backbone.encoder.stride
        return ClusterLabels.fit(waveforms, num_classes, features=features, stride=stride, seed=seed)


class ClusterLabels(nn.Module):
    """Waveforms (B, 1, samples) -> ids (B, T') of the centroids (C, D) that are nearest to their features (B, T', D).

    `stride` is the distance of two of them, in samples.

    Example:
        >>> labels = ClusterLabels.fit(torch.randn(2, 1, 16_000), 8)
        >>> labels(torch.randn(3, 1, 16_000)).shape
        torch.Size([3, 98])
    """

    centroids: Tensor

    def __init__(self, features: Callable[[Tensor], Tensor], centroids: Tensor, stride: int = MFCC_STRIDE) -> None:
        super().__init__()
        self.features, self.stride = features, stride
        self.register_buffer("centroids", centroids)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        waveforms: Tensor,
        num_classes: int,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        stride: int = MFCC_STRIDE,
        seed: int = 0,
    ) -> ClusterLabels:
        """K-means over all frames of the waveforms; `features` are HuBERT's MFCCs if not given."""
        features = features or frames_of_mfcc
        rows = torch.cat([features(part).flatten(0, 1) for part in waveforms.split(64)])
        return cls(features, kmeans(rows, num_classes, seed=seed).centroids, stride)

    @torch.no_grad()
    def forward(self, waveforms: Tensor) -> Tensor:
        x = self.features(waveforms)
        return nearest(x.flatten(0, 1), self.centroids)[1].view(x.shape[:2])


def frames_of_mfcc(waveforms: Tensor) -> Tensor:
    """(B, 1, samples) -> (B, frames, 39), every 160 samples."""
    return mfcc(waveforms.flatten(1))


class _Block(nn.Module):
    """What leaves one block of a copy of a network, which stays as it is."""

    def __init__(self, backbone: SpeechTransformer, depth: int) -> None:
        super().__init__()
        self.backbone, self.depth = copy.deepcopy(backbone).requires_grad_(False), depth

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.backbone.forward_features(waveforms, depth=self.depth)
