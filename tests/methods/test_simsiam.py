# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.methods import SimSiam, simsiam
from sslkernels.nn import ResidualCNN


def small() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(ResidualCNN(in_chans=1, channels=(8, 16)), dim=32, predictor_dim=8)


def test_loss_is_simsiams(views):
    method = small()
    loss, metrics = method(views)
    with torch.no_grad():
        z0, z1 = (method.projector(method.backbone(view)) for view in views)
        p0, p1 = method.predictor(z0).double(), method.predictor(z1).double()
        expected = -0.5 * (F.cosine_similarity(p0, z1.double()).mean() + F.cosine_similarity(p1, z0.double()).mean())
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert metrics["spread"] > 0


def test_gradient_is_stopped_at_the_other_view(views):
    """Against autograd over the formula with `detach`, for a weight of the backbone."""
    method = small()
    loss, _ = method(views)
    loss.backward()
    got = method.backbone.stem.weight.grad.clone()
    method.zero_grad()
    z0, z1 = (method.projector(method.backbone(view)) for view in views)
    p0, p1 = method.predictor(z0), method.predictor(z1)
    formula = F.cosine_similarity(p0, z1.detach()).mean() + F.cosine_similarity(p1, z0.detach()).mean()
    (-0.5 * formula).backward()
    torch.testing.assert_close(got, method.backbone.stem.weight.grad, rtol=1e-3, atol=1e-6)


def test_heads_are_the_originals():
    method = SimSiam(ResidualCNN(in_chans=1, channels=(8,)))
    linear, norm, relu = nn.Linear, nn.BatchNorm1d, nn.ReLU
    assert [type(x) for x in method.projector] == [linear, norm, relu, linear, norm, relu, linear, norm]
    assert [x.bias is None for x in method.projector if isinstance(x, linear)] == [True, True, False]
    assert not method.projector[6].bias.requires_grad and not method.projector[7].affine
    assert [type(x) for x in method.predictor] == [linear, norm, relu, linear]
    assert method.predictor[0].bias is None and method.predictor[3].bias is not None
    assert (method.projector[6].out_features, method.predictor[0].out_features) == (2048, 512)


def test_does_not_collapse(trained, training, monkeypatch):
    """The projections stay apart; they would not if the gradient went to both views and there were no predictor."""
    run = trained("simsiam").run
    assert run.method(run.batch())[1]["spread"] > 0.8

    def both_ways(pred, target, *, loss):
        return (1 - F.cosine_similarity(pred, target)).mean()

    monkeypatch.setattr(simsiam, "masked_regression", both_ways)
    collapsing = training("simsiam")
    collapsing.method.predictor = nn.Identity()
    collapsing.method.projector[7] = nn.Identity()  # a norm over the batch would spread rounding errors
    collapsing.run(60)
    loss, metrics = collapsing.method(collapsing.batch())
    assert loss < -0.98 and metrics["spread"] < 0.2
