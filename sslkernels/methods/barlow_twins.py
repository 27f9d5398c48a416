# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins: what two views say agrees, feature by feature, and no two features say the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels.evaluation import spread
from sslkernels.losses import BarlowTwinsLoss
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim


class BarlowTwins(Method):
    """Zbontar et al. 2021. batch = (view0, view1), each (B, C, H, W).

        z0, z1 = projector(backbone(view0)), projector(backbone(view1))     each view on its own: batch norm sees one
        c = standardize(z0)^T standardize(z1) / B                           (dim, dim)
        loss = sum_i (1 - c_ii)^2 + lambda_param sum_{i != j} c_ij^2        not divided by dim

    No linear layer of the projector has a bias. It may be wider than the features by far: the matrix is not stored
    where the batch is smaller than half the width. The original standardizes by one batch norm without scale and
    shift, whose running averages serve nothing; here there are none.

    Source: facebookresearch/barlowtwins `main.py::BarlowTwins`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = BarlowTwins(ResidualCNN(in_chans=1), dim=256, hidden_dim=256)
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 8192,
        hidden_dim: int = 8192,
        lambda_param: float = 0.0051,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim(backbone), hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, dim, bias=False),
        )  # fmt: skip
        self.criterion = BarlowTwinsLoss(lambda_param, process_group=process_group)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.projector(self.backbone(view)) for view in batch)
        loss = self.criterion(z0, z1)
        return loss, {"loss": loss.detach(), "spread": spread(z0)}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
