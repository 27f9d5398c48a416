# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sslkernels.methods import BarlowTwins
from sslkernels.nn import ResidualCNN


def barlow_twins(**options) -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(ResidualCNN(in_chans=1, channels=(8, 16)), **{"dim": 40, "hidden_dim": 24, **options})


def off_diagonal(c: torch.Tensor) -> torch.Tensor:
    return c - torch.diag(c.diagonal())


@pytest.mark.parametrize("dim", [40, 6], ids=["wider than the batch", "narrower"])
def test_loss_is_the_originals(dim, views):
    """main.py::BarlowTwins.forward in float64: the views pass one by one, and batch norm standardizes each."""
    method = barlow_twins(dim=dim).double()
    views = [view.double() for view in views]
    norm = nn.BatchNorm1d(dim, affine=False).double()
    z0, z1 = (copy.deepcopy(method.projector)(copy.deepcopy(method.backbone)(view)) for view in views)
    c = norm(z0).T @ norm(z1) / 12
    expected = (c.diagonal() - 1).square().sum() + 0.0051 * off_diagonal(c).square().sum()
    loss, metrics = method(views)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert 0 < metrics["spread"] < 1.5
    together = method.projector(method.backbone(torch.cat(views)))  # both views in one pass are another network
    assert not torch.allclose(together[:12], z0, atol=1e-3)


def test_every_parameter_learns(views):
    method = barlow_twins()
    method(views)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_projector_is_the_originals():
    with torch.device("meta"):
        method = BarlowTwins(ResidualCNN(in_chans=1, channels=(8,)))
    linear, norm, relu = nn.Linear, nn.BatchNorm1d, nn.ReLU
    assert [type(layer) for layer in method.projector] == [linear, norm, relu, linear, norm, relu, linear]
    assert all(layer.bias is None for layer in method.projector if isinstance(layer, linear))
    assert [layer.out_features for layer in method.projector if isinstance(layer, linear)] == [8192] * 3
    assert method.criterion.lambda_param == 0.0051


def test_the_two_views_come_to_correlate(trained):
    """Each feature agrees with itself in the other view, and little with the other features."""
    run = trained("barlow_twins").run
    with torch.no_grad():
        z0, z1 = (run.method.projector(run.method.backbone(view)) for view in run.batch(512))
    z0, z1 = ((z - z.mean(0)) / z.std(0, correction=0) for z in (z0, z1))
    c = z0.T @ z1 / len(z0)
    assert c.diagonal().mean() > 0.5  # 0.73, untrained 0.07
    assert off_diagonal(c).square().mean().sqrt() < 0.45 * c.diagonal().mean()  # 0.30, untrained 0.75
