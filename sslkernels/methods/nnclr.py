# SPDX-License-Identifier: Apache-2.0
"""NNCLR: what a view attracts is not its other view but the nearest neighbour of that among earlier images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import InfoNCELoss, MemoryQueue
from sslkernels.methods._method import Method
from sslkernels.nn import ProjectionHead, feature_dim
from sslkernels.ops import l2_normalize, nearest


class NNCLR(Method):
    """Dwibedi et al. 2021. batch = (view0, view1), each (B, C, H, W).

        z0, z1 = head(backbone(view0)), head(backbone(view1))         each view on its own: batch norm sees one
        p0, p1 = predictor(z0), predictor(z1)
        n0, n1 = the rows of the queue nearest to z0 and z1           by cosine, no gradient
        loss   = (info_nce(n0, p1) + info_nce(n1, p0)) / 2            the other rows of p repel
        queue <- normalize(z0)                                        in training, after both look-ups

    Neighbours come from earlier batches alone. At first they are random rows, and the loss falls slowly until the queue
    has filled. `metrics["neighbor"]` is the mean cosine of z0 and its neighbour. The head has three layers with batch
    norm, as SimCLR's here; lightly's example puts NT-Xent, which repels within a view too, where the paper has this.

    Source: Dwibedi et al. 2021 (arXiv:2104.14548), eq. 3 and algorithm 1; vturrisi/solo-learn `methods/nnclr.py`;
    lightly `models/modules/nn_memory_bank.py`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = NNCLR(ResidualCNN(in_chans=1), queue_size=64)
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 256,
        hidden_dim: int = 2048,
        predictor_dim: int = 4096,
        queue_size: int = 98304,
        temperature: float = 0.1,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.backbone = backbone
        self.head = ProjectionHead(feature_dim(backbone), dim, hidden_dim=hidden_dim, num_layers=3, batch_norm=True)
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_dim), nn.BatchNorm1d(predictor_dim), nn.ReLU(), nn.Linear(predictor_dim, dim)
        )
        self.queue = MemoryQueue(queue_size, dim, generator=torch.default_generator, process_group=process_group)
        self.criterion = InfoNCELoss(temperature, process_group=process_group)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.head(self.backbone(view)) for view in batch)
        rows = l2_normalize(z0.detach(), z1.detach())
        cosine, index = nearest(rows, self.queue.keys, metric="dot")  # both are unit rows
        n0, n1 = self.queue.keys[index].chunk(2)
        loss, stats = self.criterion(n0, self.predictor(z1), return_stats=True)
        loss = (loss + self.criterion(n1, self.predictor(z0))) / 2
        if self.training:
            self.queue(rows[: len(z0)])
        return loss, {"loss": loss.detach(), "neighbor": cosine[: len(z0)].mean(), **stats}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
