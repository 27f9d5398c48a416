# SPDX-License-Identifier: Apache-2.0
"""What holds for every method: it learns on real data, and stops and resumes without a trace."""

from __future__ import annotations

import io

import pytest
import torch

METHODS = ["simclr", "moco", "clip", "siglip"]
# The share of its highest value that the loss may keep after 150 steps: it keeps 0.38, 0.62, 0.56 and 0.56. MoCo starts
# near zero, as its first keys all resemble each other and none of the random queue; so the highest, not the first.
KEPT = {"simclr": 0.5, "moco": 0.75, "clip": 0.7, "siglip": 0.7}


@pytest.mark.parametrize("name", METHODS)
def test_learns(trained, name):
    run, untrained, losses = trained(name)
    assert sum(losses[-5:]) / 5 < KEPT[name] * max(losses)
    assert run.knn() > max(untrained + 0.05, 0.94)


@pytest.mark.parametrize("name", METHODS)
def test_resumes_bit_for_bit(training, name):
    run = training(name)
    run.run(3)
    file = io.BytesIO()
    torch.save(run.state(), file)
    expected = run.run(3)

    resumed = training(name, seed=1)
    file.seek(0)
    resumed.load(torch.load(file))
    assert resumed.run(3) == expected
    state = run.method.state_dict()
    for key, value in resumed.method.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_encodes_with_the_backbone(training, name):
    run = training(name)
    images = run.digits.test_images[:5]
    run.method.eval()
    backbone = run.method.backbone if name in ("simclr", "moco") else run.method.image_encoder
    assert torch.equal(run.method.encode(images), backbone(images))
    assert run.method.encode(images).shape == (5, backbone.dim)
