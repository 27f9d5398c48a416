# SPDX-License-Identifier: Apache-2.0
"""MoCo v1 and v2: queries against a queue of keys from a slowly moving copy of the encoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import InfoNCELoss, MemoryQueue
from sslkernels.methods._method import Method
from sslkernels.nn import ProjectionHead, feature_dim
from sslkernels.ops import ema_update_, l2_normalize


class MoCo(Method):
    """He et al. 2020. batch = (query_view, key_view), each (B, C, H, W).

        key_encoder <- momentum * key_encoder + (1 - momentum) * encoder       before the forward, parameters only
        q, k = normalize(encoder(query_view)), normalize(key_encoder(key_view))
        loss = info_nce(q, k, negatives=queue)                                 the queue without this batch
        queue <- k

    The key encoder gets no gradient; its batch norm statistics are its own. `mlp=True` is v2's head (with its
    temperature 0.2, to be given), else one linear layer. Evaluation mode touches neither key encoder nor queue.
    Batch norm is not shuffled between processes.

    Source: facebookresearch/moco `moco/builder.py::MoCo`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = MoCo(ResidualCNN(in_chans=1), queue_size=64)
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        mlp: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
        self.momentum = momentum
        self.backbone = backbone
        self.head = ProjectionHead(feature_dim(backbone), dim, num_layers=2 if mlp else 1)
        self.key_encoder = copy.deepcopy(nn.Sequential(self.backbone, self.head)).requires_grad_(False)
        self.queue = MemoryQueue(queue_size, dim, generator=torch.default_generator, process_group=process_group)
        self.criterion = InfoNCELoss(temperature, normalize=False, process_group=process_group)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Move the key encoder's parameters towards the encoder's; called by `forward` in training."""
        sources = [*self.backbone.parameters(), *self.head.parameters()]
        ema_update_(list(self.key_encoder.parameters()), sources, self.momentum)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        query_view, key_view = batch
        if self.training:
            self.update_key_encoder()
        # the queue's rows are unit rows already: a loss that normalised them again would copy all of them
        query = l2_normalize(self.head(self.backbone(query_view)))
        with torch.no_grad():
            key = l2_normalize(self.key_encoder(key_view))
        loss, stats = self.criterion(query, key, negative_keys=self.queue.keys, return_stats=True)
        if self.training:
            self.queue(key)
        return loss, {"loss": loss.detach(), **stats}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
