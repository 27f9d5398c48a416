# SPDX-License-Identifier: Apache-2.0
"""SwAV: every crop of an image predicts the cluster that another crop was put into, by a fair share-out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.evaluation import spread
from sslkernels.losses import MemoryQueue, SwaVLoss
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim
from sslkernels.ops import l2_normalize


class SwAV(Method):
    """Caron et al. 2020. batch = crops: two global ones, (B, C, H, W) each, then any number of local ones.

        prototypes <- rows of unit length                                   in place, before every forward in training
        z_v = unit(projector(backbone(crop_v)))                             one backbone pass for each size of crops
        s_v = z_v prototypes^T                                              (B, prototypes)
        q_i = sinkhorn(s_i, epsilon)                                        of the global crops alone, no gradient
        loss = mean_i mean_{v != i} H(q_i, softmax(s_v / temperature))

    The prototypes get no gradient in the first `freeze_prototypes_steps` steps. `queue_size` embeddings of each global
    crop, from earlier batches, are shared out together with the batch's, by the prototypes of today: from `queue_start`
    steps on they are collected, and used once the queue is full. `after_step` counts the steps.

    Source: facebookresearch/swav `main_swav.py::train`, `src/resnet50.py::ResNet.forward_head`, whose queue keeps the
    newest first and has a multiple of the batch as length; here it is a ring of any length.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = SwAV(ResidualCNN(in_chans=1), prototypes=30)
        >>> loss, metrics = method([torch.rand(8, 1, size, size) for size in (8, 8, 6, 6, 6)])
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        hidden_dim: int = 2048,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        freeze_prototypes_steps: int = 313,
        queue_size: int = 0,
        queue_start: int = 0,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim(backbone), hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, dim),
        )  # fmt: skip
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.criterion = SwaVLoss(temperature, sinkhorn_iterations, epsilon, process_group=process_group)
        self.freeze_prototypes_steps, self.queue_size, self.queue_start = (
            freeze_prototypes_steps,
            queue_size,
            queue_start,
        )
        queue: dict[str, Any] = {"generator": torch.default_generator, "process_group": process_group}
        self.queues = nn.ModuleList(MemoryQueue(queue_size, dim, **queue) for _ in range(2 if queue_size else 0))
        self.step = self.queued = 0

    def forward(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            self.normalize_prototypes()
        if len({len(crop) for crop in batch}) > 1:
            raise ValueError(f"crops must be of the same images, got {[tuple(crop.shape) for crop in batch]}")
        features = [self.backbone(torch.cat(list(crops))) for _, crops in groupby(batch, lambda crop: crop.shape)]
        z = l2_normalize(self.projector(torch.cat(features)))
        weight = self.prototypes.weight
        frozen = self.step < self.freeze_prototypes_steps
        scores = F.linear(z, weight.detach() if frozen else weight).chunk(len(batch))
        queued = None
        if self.queue_size and self.queued >= self.queue_size:
            queued = [F.linear(queue.get_buffer("keys"), weight.detach()) for queue in self.queues]
        loss = self.criterion(list(scores[:2]), list(scores[2:]), queued)
        if self.training and self.queue_size and self.step >= self.queue_start:
            for queue, embedding in zip(self.queues, z.detach().chunk(len(batch))):
                queue(embedding)
            self.queued += int(self.whole(batch[0]).total(z))
        return loss, {"loss": loss.detach(), "spread": spread(z[: len(batch[0])])}

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        self.prototypes.weight.copy_(l2_normalize(self.prototypes.weight))

    def after_step(self, step: int) -> None:
        self.step = step + 1

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    # counted in Python: a buffer would have to be read from its device in every step
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step, self.queued])

    def set_extra_state(self, state: Tensor) -> None:
        self.step, self.queued = state.tolist()
