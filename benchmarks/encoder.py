# SPDX-License-Identifier: Apache-2.0
"""A small reference encoder: what a loss costs is to be seen beside the rest of a training step."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.stats import summary
from sslkernels.nn import ProjectionHead, ResidualCNN

NAME = "sslkernels.nn.ResidualCNN with a projection head, 3 x 32 x 32 images in batches of 128, SGD"


def seconds_per_image(rounds: int, batch: int = 128) -> float:
    """Median of forward, backward and optimiser step, by image; an encoder's time is linear in the batch."""
    torch.manual_seed(0)
    encoder = nn.Sequential(ResidualCNN(in_chans=3), ProjectionHead(128, 128, batch_norm=True))
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
