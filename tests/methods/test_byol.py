# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sslkernels.methods import BYOL
from sslkernels.nn import ResidualCNN


@pytest.fixture
def method() -> BYOL:
    torch.manual_seed(0)
    return BYOL(ResidualCNN(in_chans=1, channels=(8, 16)), dim=16, hidden_dim=32, momentum=0.9, total_steps=10)


def distance(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The original's regression_loss: x * rsqrt(max(sum x^2, 1e-12)), then the squared distance."""
    p, z = (x.double() * x.double().square().sum(dim=1, keepdim=True).clamp(min=1e-12).rsqrt() for x in (p, z))
    return (p - z).square().sum(dim=1)


def test_loss_is_byols_with_batch_norm_over_one_view_at_a_time(method, views):
    loss, metrics = method(views)
    networks = copy.deepcopy(method)
    with torch.no_grad():
        p0, p1 = (networks.predictor(networks.online(view)) for view in views)
        z0, z1 = (networks.target(view) for view in views)
    expected = (distance(p0, z1) + distance(p1, z0)).mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    assert 0 < metrics["spread"] < 1.5
    # both views in one pass are another network
    with torch.no_grad():
        together = networks.target(torch.cat(views))
    assert not torch.allclose(together, torch.cat([z0, z1]), atol=1e-3)


def test_gradient_goes_to_the_online_network_alone(method, views):
    loss, _ = method(views)
    loss.backward()
    assert all(p.grad is not None for p in (*method.online.parameters(), *method.predictor.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


def test_target_starts_elsewhere_unless_it_is_given(method):
    online, target = method.online.backbone.stem.weight, method.target.module.backbone.stem.weight
    assert not torch.allclose(online, target) and (online.std() / target.std() - 1).abs() < 0.5
    backbone = ResidualCNN(in_chans=1, channels=(8,))
    given = BYOL(backbone, dim=8, hidden_dim=8, target_backbone=backbone)
    assert torch.equal(given.target.module.backbone.stem.weight, backbone.stem.weight)
    assert given.target.module.backbone is not backbone


def test_target_follows_along_a_cosine_after_the_step(method, views):
    before = [p.clone() for p in method.target.parameters()]
    method(views)
    assert all(torch.equal(a, b) for a, b in zip(method.target.parameters(), before, strict=True))
    method.after_step(3)
    momentum = 1 - (1 - 0.9) * (1 + math.cos(math.pi * 3 / 10)) / 2
    for now, old, online in zip(method.target.parameters(), before, method.online.parameters(), strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * online, rtol=1e-5, atol=1e-6)
    end = [p.clone() for p in method.target.parameters()]
    method.after_step(10)  # momentum 1
    assert all(torch.equal(a, b) for a, b in zip(method.target.parameters(), end, strict=True))


def test_target_keeps_its_own_statistics(method, views):
    """In training its batch norms see the views, and the update leaves their averages alone."""
    norm = method.target.module.backbone.bn
    method(views)
    seen = norm.running_mean.clone()
    assert seen.abs().max() > 0 and not torch.allclose(seen, method.online.backbone.bn.running_mean)
    method.after_step(0)
    assert torch.equal(norm.running_mean, seen)
    method.eval()
    method(views)
    assert torch.equal(norm.running_mean, seen)


def test_heads_are_the_originals():
    method = BYOL(ResidualCNN(in_chans=1, channels=(8,)))
    for head, width in ((method.online.projector, 8), (method.predictor, 256)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert (head[0].in_features, head[0].out_features, head[3].out_features) == (width, 4096, 256)
        assert head[0].bias is not None and head[3].bias is None
    assert method.target.momentum_at(0) == method.target.momentum_at(10**6) == 0.996


def test_does_not_collapse(trained):
    """The projections of a batch stay apart; the features' test is in test_training.py."""
    run = trained("byol").run
    assert run.method(run.batch())[1]["spread"] > 0.5
