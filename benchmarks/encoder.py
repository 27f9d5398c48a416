# SPDX-License-Identifier: Apache-2.0
"""A small reference encoder: what a loss costs is to be seen beside the rest of a training step."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.stats import summary

NAME = "8-layer CNN, 3 x 32 x 32 images, 32 to 128 channels, batches of 128, SGD"


def build() -> nn.Module:
    def block(inward: int, outward: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inward, outward, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(),
            nn.Conv2d(outward, outward, 3, padding=1, bias=False), nn.BatchNorm2d(outward), nn.ReLU(),
        )  # fmt: skip

    stages = [block(3, 32, 1), block(32, 64, 2), block(64, 128, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)]
    return nn.Sequential(*stages, *head)


def seconds_per_image(rounds: int, batch: int = 128) -> float:
    """Median of forward, backward and optimiser step, by image; an encoder's time is linear in the batch."""
    torch.manual_seed(0)
    encoder = build()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 3, 32, 32)
    samples = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        encoder(images).square().mean().backward()
        optimizer.step()
        samples.append((time.perf_counter() - start) / batch)
    return summary(samples[2:]).median  # two warm-up steps
