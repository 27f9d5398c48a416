# SPDX-License-Identifier: Apache-2.0
"""BYOL: one view predicts what a slowly moving copy of the network makes of the other; nothing repels."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.ema import EMA
from sslkernels.evaluation import spread
from sslkernels.methods._method import Method
from sslkernels.nn import feature_dim
from sslkernels.ops import masked_regression


class BYOL(Method):
    """Grill et al. 2020. batch = (view0, view1), each (B, C, H, W).

        p0, p1 = predictor(online(view0)), predictor(online(view1))     online = projector(backbone(.)), gradient
        z0, z1 = target(view0), target(view1)                           no gradient
        loss   = mean_b(|unit(p0) - unit(z1)|^2 + |unit(p1) - unit(z0)|^2)             = 4 - 2 cos - 2 cos, not halved
        target <- m * target + (1 - m) * online                         in `after_step`, parameters only

    Every view goes through a network on its own, so batch norm sees one view at a time. The target starts from another
    random initialisation than the online network (a copy whose parts have called `reset_parameters`; give
    `target_backbone` where that is not wanted, as for pretrained weights) and, in training mode, keeps batch norm
    statistics of its own. m goes from `momentum` to 1 along a cosine over `total_steps`, or stays without them.

    Source: google-deepmind/deepmind-research `byol/byol_experiment.py`, `byol/utils/{helpers,networks,schedules}.py`.

    Example:
        >>> from sslkernels.nn import ResidualCNN
        >>> method = BYOL(ResidualCNN(in_chans=1), total_steps=1000)
        >>> loss, metrics = method((torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)))
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 256,
        hidden_dim: int = 4096,
        momentum: float = 0.996,
        total_steps: int | None = None,
        target_backbone: nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        projector = _mlp(feature_dim(backbone), hidden_dim, dim)
        self.online = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.predictor = _mlp(dim, hidden_dim, dim)
        target = reinitialized(self.online)
        if target_backbone is not None:
            target.backbone = target_backbone
        schedule = "constant" if total_steps is None else "cosine"
        self.target = EMA(target, momentum, schedule=schedule, total_steps=total_steps, use_buffers="ignore")

    @property
    def backbone(self) -> nn.Module:
        return self.online.get_submodule("backbone")

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = (self.online(view) for view in batch)
        with torch.no_grad():
            target0, target1 = (self.target(view) for view in batch)
        loss = masked_regression(self.predictor(z0), target1, loss="normalized_l2")
        loss = loss + masked_regression(self.predictor(z1), target0, loss="normalized_l2")
        loss = self.whole(z0).weigh(loss)
        return loss, {"loss": loss.detach(), "spread": spread(z0)}

    def after_step(self, step: int) -> None:
        """Move the target towards the online network."""
        self.target.update(self.online, step)

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The original's head, for projector and predictor alike: no norm at the end, no bias in the last layer."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim, bias=False)
    )


def reinitialized(module: nn.Module) -> nn.Module:
    """A copy with fresh parameters; what has no `reset_parameters` keeps the values it had."""
    fresh = copy.deepcopy(module)
    for part in fresh.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return fresh
