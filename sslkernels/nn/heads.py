# SPDX-License-Identifier: Apache-2.0
"""The head of DINO, iBOT and DINOv2: a narrow bottleneck before a wide layer of prototypes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from sslkernels.nn.transformer import init_linear
from sslkernels.ops import l2_normalize


class WeightNormLinear(nn.Module):
    """x @ weight.T, where weight = weight_g * weight_v / |weight_v|, row by row, and `weight_g` starts at 1.

    The names are those that `torch.nn.utils.weight_norm` gives, which is deprecated.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_g: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_g)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)

    @property
    def weight(self) -> Tensor:
        return torch._weight_norm(self.weight_v, self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class DINOHead(nn.Module):
    """Features (..., in_dim) -> logits (..., out_dim), one for each prototype.

        z      = unit(mlp(x))                   `nlayers` linear layers with GELU between, the last bottleneck_dim wide
        logits = z @ weight.T                   cosines, while the rows of the weight have length 1

    `bottleneck(x)` is z and `last_layer.weight` the weight, which is what `linear_soft_cross_entropy` takes in place of
    the logits. With `norm_last_layer` the rows keep length 1; without (DINOv2) their lengths are learned. `use_bn` puts
    batch norm, over all rows, ahead of each GELU.

    Parameters are named as in the originals: `mlp.0.weight`, ..., `last_layer.weight_g` and `last_layer.weight_v`. Rows
    are normalized in float32, so z needs no larger eps in 16 bits than the originals' 1e-12 elsewhere.

    Source: facebookresearch/dino `vision_transformer.py::DINOHead`, facebookresearch/dinov2
    `dinov2/layers/dino_head.py`.

    Example:
        >>> head = DINOHead(32, 1000, hidden_dim=64, bottleneck_dim=16)
        >>> head(torch.rand(4, 32)).shape, head.bottleneck(torch.rand(4, 32)).shape, head.last_layer.weight.shape
        (torch.Size([4, 1000]), torch.Size([4, 16]), torch.Size([1000, 16]))
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        norm_last_layer: bool = True,
        use_bn: bool = False,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers must be at least 1, got {nlayers}")
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise(widths):
            if layers:
                layers += [nn.BatchNorm1d(before)] * use_bn + [nn.GELU()]
            layers.append(nn.Linear(before, width))
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        init_linear(self.mlp, "normal")
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_g=not norm_last_layer)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Unit rows (..., bottleneck_dim)."""
        z = l2_normalize(self.mlp(x.flatten(0, -2)))
        return z.unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(x))
