# SPDX-License-Identifier: Apache-2.0
"""Linear classifiers trained by SGD at several learning rates at once, on a stream of frozen features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.evaluation._labelled import Batches, batches, labelled

# DINOv2's, for a batch of 256
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class LinearProbe(nn.Module):
    """One linear head for each learning rate, all trained on the same batches, in one product.

        x        = batch_norm(features)                     no scale and shift; running statistics in `accuracy`
        logits_h = x W_h^T + b_h                            W (H, C, D) ~ N(0, 0.01^2), b = 0
        v_h      = momentum v_h + d cross_entropy(logits_h, labels)
        W_h, b_h -= lr_h batch_size / 256 (1 + cos(pi step / total_steps)) / 2 v_h

    Feed it batches (`step`), whatever size the training set has; then `select` the head that is best on held-out
    training items. Choosing by the test items, as DINOv2 does, flatters. Learning rates far above the best may
    overflow; a head whose scores are not numbers is right about nothing.

    Source: the grid of learning rates facebookresearch/dinov2 `dinov2/eval/linear.py`; batch norm without affine
    facebookresearch/mae `main_linprobe.py`; MAE trains with LARS, DINOv2 without batch norm.

    Args:
        dim, num_classes: widths D and C.
        total_steps: length of the training: the rates fall along a cosine.
        learning_rates: for a batch of 256.
        batch_size: of the steps, scales the rates.
        momentum: of SGD.
        batch_norm: False takes features as they are.
        generator: of the weights.

    Raises:
        ValueError, TypeError: features that are not (B, D) floating, or labels that are not (B,) int64 in [0, C); an
            option out of range; a step beyond the last.

    Example:
        >>> probe = LinearProbe(4, 3, total_steps=20)
        >>> for _ in range(20):
        ...     losses = probe.step(torch.eye(4)[:3].repeat(2, 1), torch.arange(3).repeat(2))
        >>> probe.select(torch.eye(4)[:3], torch.arange(3)).accuracy(torch.eye(4)[:3], torch.arange(3))
        1.0
    """

    weight: Tensor
    bias: Tensor
    weight_velocity: Tensor
    bias_velocity: Tensor
    steps: Tensor
    best: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        total_steps: int,
        learning_rates: Sequence[float] = LEARNING_RATES,
        batch_size: int = 256,
        momentum: float = 0.9,
        batch_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_classes": num_classes, "total_steps": total_steps, "batch_size": batch_size}
        for name, x in sizes.items():
            check.integer(name, x, 1)
        for rate in learning_rates:
            check.positive("learning_rates", rate)
        if not learning_rates:
            raise ValueError("learning_rates must hold at least one, got none")
        check.in_range("momentum", momentum, 0.0, 1.0)
        self.total_steps, self.momentum = total_steps, momentum
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False) if batch_norm else None
        self.rates = tuple(rate * batch_size / 256 for rate in sorted(learning_rates))
        heads = len(self.rates)
        state = {
            "weight": torch.empty(heads, num_classes, dim).normal_(std=0.01, generator=generator),
            "bias": torch.zeros(heads, num_classes),
            "weight_velocity": torch.zeros(heads, num_classes, dim),
            "bias_velocity": torch.zeros(heads, num_classes),
            "steps": torch.zeros((), dtype=torch.int64),
            "best": torch.zeros((), dtype=torch.int64),
        }
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Train all heads on one batch, (B, D) with labels (B,); their losses (H,) before it."""
        self._check(features, labels)
        check.not_empty("features", features)
        if int(self.steps) >= self.total_steps:
            raise ValueError(f"total_steps is {self.total_steps}, and all have been taken")
        x = self._input(features, training=True)
        log_p = self._logits(x).log_softmax(dim=2)  # (B, H, C)
        own = labels[:, None, None].expand(-1, log_p.shape[1], 1)
        losses = -log_p.gather(2, own).mean(dim=(0, 2))
        error = log_p.exp_().scatter_add_(2, own, log_p.new_full((1, 1, 1), -1.0).expand_as(own)) / len(x)
        gradients = (error.flatten(1).T @ x).view_as(self.weight), error.sum(dim=0)

        rate = self.weight.new_tensor(self.rates) * (0.5 + 0.5 * math.cos(math.pi * int(self.steps) / self.total_steps))
        for weight, velocity, gradient in zip(
            (self.weight, self.bias), (self.weight_velocity, self.bias_velocity), gradients, strict=True
        ):
            velocity.mul_(self.momentum).add_(gradient)
            weight.sub_(rate.view(-1, *[1] * (weight.ndim - 1)) * velocity)
        self.steps += 1
        return losses

    @torch.no_grad()
    def accuracies(self, features: Tensor | Batches, labels: Tensor | None = None, *, chunk_size: int = 1024) -> Tensor:
        """Share of items that each head names rightly, (H,) float64; of tensors, or of an iterable of such pairs."""
        right, total = torch.zeros(len(self.rates), dtype=torch.int64, device=self.weight.device), 0
        for some, truth in batches(features, labels, chunk_size):
            self._check(some)
            logits = self._logits(self._input(some, training=False))
            top, classes = logits.max(dim=2)
            right += ((classes == truth[:, None]) & top.isfinite()).sum(dim=0)
            total += len(truth)
        if not total:
            raise ValueError("features must not be empty, got no item to classify")
        return right.double() / total

    def select(self, features: Tensor | Batches, labels: Tensor | None = None) -> LinearProbe:
        """Make that head the `best` which names most of these held-out training items."""
        self.best.copy_(self.accuracies(features, labels).argmax())  # of equals the first, the slowest
        return self

    def accuracy(self, features: Tensor | Batches, labels: Tensor | None = None) -> float:
        """Share of items that the `best` head names rightly."""
        return float(self.accuracies(features, labels)[self.best])

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of the `best` head; batch norm by its running statistics, as in `accuracy`."""
        self._check(features)
        return self._logits(self._input(features, training=False))[:, self.best]

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)

    def _input(self, features: Tensor, *, training: bool) -> Tensor:
        x = features.to(self.weight.dtype)
        return x if self.norm is None else self.norm.train(training)(x)

    def _check(self, features: Tensor, labels: Tensor | None = None) -> None:
        if labels is not None:
            labelled(features, labels)
            if labels.numel() and int(labels.max()) >= self.bias.shape[1]:
                raise ValueError(f"labels must be below {self.bias.shape[1]} (num_classes), got {int(labels.max())}")
        if features.shape[1] != self.weight.shape[2]:
            raise ValueError(f"features must be {self.weight.shape[2]} wide, got shape {tuple(features.shape)}")
