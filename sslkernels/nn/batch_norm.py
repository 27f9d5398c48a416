# SPDX-License-Identifier: Apache-2.0
"""Batch norm over the rows of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkernels.distributed import Batch
from sslkernels.distributed._group import span


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of (N, C, ...) whose statistics in training are those of the rows of all ranks, on any device.

        mean = sum over all ranks of x / n;  var = sum over all ranks of (x - mean)^2 / n       two sums of C numbers
        y = (x - mean) / sqrt(var + eps) * weight + bias

    The gradient is that of the sum of all ranks' losses, as that of the losses here. `torch.nn.SyncBatchNorm`, which
    is faster and keeps less for backward, has the same, on GPUs alone; rounding aside the two are one.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm1d`.
        process_group: as in `distributed.Group`. Every rank must call the module as often as the others.

    Example:
        >>> GlobalBatchNorm(4)(torch.randn(8, 4, 5, 5)).shape
        torch.Size([8, 4, 5, 5])
    """

    def __init__(self, num_features: int, *args: Any, process_group: Any = "world", **options: Any) -> None:
        super().__init__(num_features, *args, **options)
        self.process_group = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        name, rank, world, strategy, _ = span(self.process_group)
        if world == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        self._check_input_dim(x)
        # no comparison of what ranks bring: rows are counted with the first sum
        batch = Batch(name, rank, world, strategy, x.shape[0], None)
        wide = x if x.dtype == torch.float64 else x.float()
        over, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        own = wide.new_full((1,), x.numel() // self.num_features)
        sums = batch.sum(torch.cat([wide.sum(over), own]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centered = wide - mean.view(shape)
        var = batch.sum(centered.square().sum(over)) / n
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), var.detach() * n / (n - 1))
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        y = centered * scale.view(shape)
        return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        new = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), new)
        self.running_var.lerp_(var.to(self.running_var.dtype), new)


def global_batch_norm(module: nn.Module, process_group: Any = "world") -> nn.Module:
    """The module with `GlobalBatchNorm` in place of every batch norm; parameters and buffers are the same tensors.

    Example:
        >>> model = global_batch_norm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        >>> model[1]
        GlobalBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    """
    for name, part in module.named_children():
        setattr(module, name, global_batch_norm(part, process_group))
    if not isinstance(module, _BatchNorm) or isinstance(module, GlobalBatchNorm):
        return module
    new = GlobalBatchNorm(
        module.num_features,
        *(module.eps, module.momentum, module.affine, module.track_running_stats),
        process_group=process_group,
    )
    new._parameters, new._buffers, new.training = module._parameters, module._buffers, module.training
    return new
