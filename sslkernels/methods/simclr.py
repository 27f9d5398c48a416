# SPDX-License-Identifier: Apache-2.0
"""SimCLR: two views of an image attract, all other images of the batch repel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import NTXentLoss
from sslkernels.methods._method import Method
from sslkernels.nn import ProjectionHead, feature_dim


class SimCLR(Method):
    """Chen et al. 2020. batch = (view0, view1), each (B, C, H, W).

        z0, z1 = head(backbone(cat(view0, view1))).chunk(2)     one forward, so that batch norm sees both views
        loss = 2 * nt_xent(z0, z1)

    The factor two is the original's: it adds the two directions where other code takes the mean over 2B rows. The head
    has three layers with batch norm, the last without shift (the paper has two: `num_layers=2`).

    Source: google-research/simclr `tf2/objective.py::add_contrastive_loss`, `tf2/model.py::ProjectionHead`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> loss, metrics = SimCLR(ResidualCNN(in_chans=1))((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        temperature: float = 0.1,
        num_layers: int = 3,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.backbone = backbone
        self.head = ProjectionHead(feature_dim(backbone), dim, num_layers=num_layers, batch_norm=True)
        self.criterion = NTXentLoss(temperature, process_group=process_group)

    def project(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The two views' projections (B, dim), not yet normalised: the input of the loss."""
        view0, view1 = batch
        if view0.shape != view1.shape:
            raise ValueError(f"the two views must have one shape, got {tuple(view0.shape)} and {tuple(view1.shape)}")
        z0, z1 = self.head(self.backbone(torch.cat([view0, view1]))).chunk(2)
        return z0, z1

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.criterion(*self.project(batch), return_stats=True)
        loss = 2 * loss
        return loss, {"loss": loss.detach(), **stats}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
