# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.methods import SimCLR
from sslkernels.nn import ResidualCNN, VisionTransformer


def test_loss_is_the_originals_sum_of_both_directions(views):
    """objective.py: CE([ab | aa]) + CE([ba | bb]), self-pairs masked, mean over n; written out in float64."""
    torch.manual_seed(0)
    method = SimCLR(ResidualCNN(in_chans=1))
    loss, metrics = method(views)
    a, b = (F.normalize(z.double(), dim=1) for z in method.project(views))
    n = len(a)
    masked = torch.diag(torch.full((n,), -1e9, dtype=torch.float64))
    labels = torch.arange(n)
    loss_a = F.cross_entropy(torch.cat([a @ b.T, a @ a.T + masked], dim=1) / 0.1, labels)
    loss_b = F.cross_entropy(torch.cat([b @ a.T, b @ b.T + masked], dim=1) / 0.1, labels)
    torch.testing.assert_close(loss.double(), loss_a + loss_b, rtol=1e-5, atol=0)
    assert metrics["loss"] == loss


def test_batch_norm_sees_both_views_at_once(views):
    calls = []
    backbone = ResidualCNN(in_chans=1)
    backbone.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    SimCLR(backbone)(views)
    (images,) = calls
    assert torch.equal(images, torch.cat(views))


def test_head_is_the_originals():
    head = SimCLR(ResidualCNN(in_chans=1)).head
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in head] == kinds
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert head[-1].bias is None and head[-1].weight is not None and head[-1].num_features == 128


def test_trains_a_vision_transformer(views):
    torch.manual_seed(0)
    method = SimCLR(VisionTransformer(in_chans=1, patch_size=2, embed_dim=32, depth=2))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss, _ = method(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in method.parameters())


def test_refuses_views_of_two_shapes(views):
    with pytest.raises(ValueError, match="views"):
        SimCLR(ResidualCNN(in_chans=1))((views[0], views[1][:5]))
