# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.methods import VICReg
from sslkernels.nn import ResidualCNN


def vicreg(**options) -> VICReg:
    torch.manual_seed(0)
    return VICReg(ResidualCNN(in_chans=1, channels=(8, 16)), **{"dim": 40, "hidden_dim": 24, **options})


def variance(z: torch.Tensor) -> torch.Tensor:
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def covariance(z: torch.Tensor) -> torch.Tensor:
    c = (z - z.mean(dim=0)).T @ (z - z.mean(dim=0)) / (len(z) - 1)
    return (c - torch.diag(c.diagonal())).square().sum() / z.shape[1]


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_loss_is_the_originals(variant, views):
    """main_vicreg.py::VICReg.forward in float64: the views pass one by one; the paper does not halve the variance."""
    method = vicreg(variant=variant).double()
    views = [view.double() for view in views]
    z0, z1 = (copy.deepcopy(method.expander)(copy.deepcopy(method.backbone)(view)) for view in views)
    spread = (variance(z0) + variance(z1)) / (2 if variant == "code" else 1)
    expected = 25 * F.mse_loss(z0, z1) + 25 * spread + covariance(z0) + covariance(z1)
    loss, metrics = method(views)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert 0 < metrics["spread"] < 1.5


def test_weights_of_the_terms(views):
    method = vicreg(lambda_param=0.0, mu_param=0.0, nu_param=3.0).double()
    views = [view.double() for view in views]
    z0, z1 = (copy.deepcopy(method.expander)(copy.deepcopy(method.backbone)(view)) for view in views)
    torch.testing.assert_close(method(views)[0], 3 * (covariance(z0) + covariance(z1)), rtol=1e-9, atol=0)


def test_every_parameter_learns(views):
    """But for the biases that a batch norm takes away."""
    method = vicreg()
    method(views)[0].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0 or name in ("expander.0.bias", "expander.3.bias")


def test_expander_is_the_originals():
    with torch.device("meta"):
        method = VICReg(ResidualCNN(in_chans=1, channels=(8,)))
    linear, norm, relu = nn.Linear, nn.BatchNorm1d, nn.ReLU
    assert [type(layer) for layer in method.expander] == [linear, norm, relu, linear, norm, relu, linear]
    layers = [layer for layer in method.expander if isinstance(layer, linear)]
    assert [layer.bias is not None for layer in layers] == [True, True, False]
    assert [layer.out_features for layer in layers] == [8192] * 3
    criterion = method.criterion
    assert (criterion.lambda_param, criterion.mu_param, criterion.nu_param, criterion.eps) == (25.0, 25.0, 1.0, 1e-4)
    assert criterion.variant == "code"


def test_features_of_the_expander_vary(trained):
    """The variance term holds every feature up: without it they all shrink to a point."""
    run = trained("vicreg").run
    with torch.no_grad():
        z = run.method.expander(run.method.backbone(run.batch(512)[0]))
    assert z.std(dim=0).min() > 0.3  # 0.44
