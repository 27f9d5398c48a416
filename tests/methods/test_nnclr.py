# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.methods import NNCLR
from sslkernels.nn import ResidualCNN


@pytest.fixture
def method() -> NNCLR:
    torch.manual_seed(0)
    return NNCLR(ResidualCNN(in_chans=1, channels=(8, 16)), dim=24, hidden_dim=32, predictor_dim=40, queue_size=50)


def formula(method, views, queue):
    """Algorithm 1 of the paper over the method's own networks: the loss, and the look-ups that it made."""
    z = [method.head(method.backbone(view)) for view in views]
    p = [F.normalize(method.predictor(x).double(), dim=1) for x in z]
    z = [F.normalize(x.detach().double(), dim=1) for x in z]
    found = [(x @ queue.T.double()).argmax(dim=1) for x in z]
    own = torch.arange(len(z[0]))
    losses = [
        F.cross_entropy(queue[found[0]].double() @ p[1].T / 0.1, own),
        F.cross_entropy(queue[found[1]].double() @ p[0].T / 0.1, own),
    ]
    return sum(losses) / 2, z[0], found


def test_loss_and_gradients_are_the_papers(method, views):
    before = copy.deepcopy(method)
    loss, metrics = method(views)
    loss.backward()
    expected, z0, found = formula(before, views, before.queue.keys)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for (name, weight), (_, other) in zip(method.named_parameters(), before.named_parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)
    cosine = (z0 * before.queue.keys[found[0]].double()).sum(dim=1).mean()
    torch.testing.assert_close(metrics["neighbor"].double(), cosine, rtol=1e-5, atol=0)
    assert len(set(found[0].tolist())) > 1


def test_the_first_view_enters_the_queue_after_the_look_up(method, views):
    """A neighbour is never the view itself: with this batch in the queue its cosine would be 1."""
    before = method.queue.keys.clone()
    _, metrics = method(views)
    assert metrics["neighbor"] < 0.99
    n = len(views[0])
    z0 = method.head(method.backbone(views[0]))
    torch.testing.assert_close(method.queue.keys[:n], F.normalize(z0, dim=1).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(method.queue.keys[n:], before[n:]) and int(method.queue.pointer) == n
    assert method(views)[1]["neighbor"] > 0.999


def test_views_pass_one_by_one(method, views):
    calls = []
    method.backbone.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    method(views)
    assert len(calls) == 2 and all(torch.equal(call, view) for call, view in zip(calls, views))


def test_evaluation_changes_nothing(method, views):
    method.eval()
    before = copy.deepcopy(method.state_dict())
    method(views)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_defaults_are_the_papers():
    method = NNCLR(ResidualCNN(in_chans=1, channels=(8,)), queue_size=8)
    linear, norm, relu = nn.Linear, nn.BatchNorm1d, nn.ReLU
    assert [type(x) for x in method.head] == [linear, norm, relu, linear, norm, relu, linear, norm]
    assert [type(x) for x in method.predictor] == [linear, norm, relu, linear]
    widths = [x.out_features for x in (*method.head, *method.predictor) if isinstance(x, linear)]
    assert widths == [2048, 2048, 256, 4096, 256] and method.criterion.temperature == 0.1
    assert NNCLR(ResidualCNN(in_chans=1, channels=(8,)), dim=2, hidden_dim=2).queue.keys.shape == (98304, 2)
