# SPDX-License-Identifier: Apache-2.0
"""SimSiam: BYOL without the second network; a predictor and a stopped gradient are enough."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels.evaluation import spread
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim
from sslkernels.ops import masked_regression


class SimSiam(Method):
    """Chen and He 2021. batch = (view0, view1), each (B, C, H, W).

        z0, z1 = projector(backbone(view0)), projector(backbone(view1))     each view on its own: batch norm sees one
        p0, p1 = predictor(z0), predictor(z1)
        loss   = -(mean_b cos(p0, stop(z1)) + mean_b cos(p1, stop(z0))) / 2             in [-1, 1]

    A loss of -1 is agreement, and collapse as well: `metrics["spread"]` tells them apart. The projector's last layer
    has a batch norm without scale and shift after it, and a bias that is not trained. The original can keep the
    predictor's learning rate constant (`--fix-pred-lr`): give the optimizer two groups of parameters for that.

    Source: facebookresearch/simsiam `simsiam/builder.py`, `main_simsiam.py`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> loss, metrics = SimSiam(ResidualCNN(in_chans=1))((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self, backbone: nn.Module, *, dim: int = 2048, predictor_dim: int = 512, process_group: Any = None
    ) -> None:
        super().__init__(process_group)
        width = feature_dim(backbone)
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, dim), nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.projector[6].bias.requires_grad = False  # the batch norm takes it away
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_dim, bias=False), nn.BatchNorm1d(predictor_dim), nn.ReLU(),
            nn.Linear(predictor_dim, dim),
        )  # fmt: skip

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.projector(self.backbone(view)) for view in batch)
        # the op's gradient goes to its first argument alone
        distance = masked_regression(self.predictor(z0), z1, loss="cosine")
        distance = distance + masked_regression(self.predictor(z1), z0, loss="cosine")
        loss = self.whole(z0).weigh(distance / 2 - 1)
        return loss, {"loss": loss.detach(), "spread": spread(z0)}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
