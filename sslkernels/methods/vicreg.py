# SPDX-License-Identifier: Apache-2.0
"""VICReg: views agree, every feature varies, no two features vary together; three terms with a weight each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels.evaluation import spread
from sslkernels.losses import VICRegLoss
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim


class VICReg(Method):
    """Bardes et al. 2022. batch = (view0, view1), each (B, C, H, W).

        z0, z1 = expander(backbone(view0)), expander(backbone(view1))       each view on its own: batch norm sees one
        loss = lambda_param mean (z0 - z1)^2                                invariance
             + mu_param (v(z0) + v(z1)) / 2                                 v: mean_d max(0, 1 - std_d)
             + nu_param (c(z0) + c(z1))                                     c: sum_{i != j} cov_ij^2 / dim

    The loss is the authors' code; `variant="paper"` does not halve the variance, see `sslkernels.losses.vicreg_loss`.
    The expander has no norm at its end: its features' scale is what the variance term holds up. Its last layer has no
    bias, the others have one.

    Source: facebookresearch/vicreg `main_vicreg.py::VICReg, Projector`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = VICReg(ResidualCNN(in_chans=1), dim=256, hidden_dim=256)
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 8192,
        hidden_dim: int = 8192,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        variant: str = "code",
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        self.backbone = backbone
        self.expander = nn.Sequential(
            nn.Linear(feature_dim(backbone), hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
            nn.Linear(hidden_dim, dim, bias=False),
        )  # fmt: skip
        self.criterion = VICRegLoss(lambda_param, mu_param, nu_param, variant=variant, process_group=process_group)

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.expander(self.backbone(view)) for view in batch)
        loss = self.criterion(z0, z1)
        return loss, {"loss": loss.detach(), "spread": spread(z0)}

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)
