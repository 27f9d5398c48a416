# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.nn import DINOHead
from sslkernels.ops import linear_soft_cross_entropy, soft_cross_entropy


def original(in_dim: int, out_dim: int, hidden: int, bottleneck: int, layers: int, norm_last_layer: bool, use_bn: bool):
    """The published head's modules, by name."""
    mlp: list[nn.Module] = [nn.Linear(in_dim, hidden), *([nn.BatchNorm1d(hidden)] if use_bn else []), nn.GELU()]
    for _ in range(layers - 2):
        mlp += [nn.Linear(hidden, hidden), *([nn.BatchNorm1d(hidden)] if use_bn else []), nn.GELU()]
    head = nn.Module()
    head.mlp = nn.Sequential(*mlp, nn.Linear(hidden, bottleneck)) if layers > 1 else nn.Linear(in_dim, bottleneck)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated, and the originals' still
        head.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
    head.last_layer.weight_g.data.fill_(1)
    head.last_layer.weight_g.requires_grad = not norm_last_layer
    return head


@pytest.mark.parametrize("options", [(3, True, False), (3, True, True), (2, False, False), (1, True, False)], ids=str)
def test_is_the_originals(options):
    """Same names in the state_dict, same output, same gradients, lengths of the prototypes that are learned or not."""
    layers, norm_last_layer, use_bn = options
    theirs = original(10, 13, 12, 6, *options).double()
    head = DINOHead(10, 13, 12, 6, layers, norm_last_layer, use_bn).double()
    assert list(head.state_dict()) == list(theirs.state_dict())
    assert all(a.shape == b.shape for a, b in zip(head.state_dict().values(), theirs.state_dict().values()))
    head.load_state_dict(theirs.state_dict())
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer
    x = torch.randn(7, 10, dtype=torch.float64)
    expected = theirs.last_layer(F.normalize(theirs.mlp(x), dim=-1, eps=1e-12))
    logits = head(x)
    torch.testing.assert_close(logits, expected)
    cotangent = torch.randn_like(logits)
    (logits * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for (name, p), q in zip(head.named_parameters(), theirs.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_starts_as_the_originals():
    torch.manual_seed(0)
    head = DINOHead(64, 500, hidden_dim=256, bottleneck_dim=32)
    weights = torch.cat([p.flatten() for name, p in head.mlp.named_parameters() if name.endswith("weight")])
    assert 0.0195 < weights.std() < 0.0205
    assert all(p.abs().max() == 0 for name, p in head.mlp.named_parameters() if name.endswith("bias"))
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(500))
    logits = head(torch.randn(50, 64))
    assert logits.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head.bottleneck(torch.randn(2, 3, 64)).norm(dim=-1), torch.ones(2, 3))


def test_bottleneck_and_weight_are_what_the_fused_loss_takes():
    torch.manual_seed(0)
    head = DINOHead(10, 13, hidden_dim=12, bottleneck_dim=6, norm_last_layer=False).double()
    teacher = DINOHead(10, 13, hidden_dim=12, bottleneck_dim=6).double().requires_grad_(False)
    fused = copy.deepcopy(head)
    student, global_crops = torch.randn(5, 4, 10, dtype=torch.float64), torch.randn(2, 4, 10, dtype=torch.float64)
    loss = soft_cross_entropy(head(student), teacher(global_crops))
    loss.backward()
    z, weight = fused.bottleneck(student), fused.last_layer.weight
    other = linear_soft_cross_entropy(z, weight, teacher.bottleneck(global_crops), teacher.last_layer.weight)
    other.backward()
    torch.testing.assert_close(other, loss)
    for (name, p), q in zip(fused.named_parameters(), head.parameters()):
        assert p.grad is not None and p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad)


def test_zero_features_of_16_bits_stay_finite():
    """The originals need a larger eps there: theirs rounds to zero in float16."""
    head = DINOHead(4, 5, hidden_dim=8, bottleneck_dim=3).half()
    z = head.bottleneck(torch.zeros(2, 4, dtype=torch.float16))  # biases are zero: the MLP's output is
    assert torch.equal(z, torch.zeros(2, 3, dtype=torch.float16))


def test_refuses_no_layers():
    with pytest.raises(ValueError, match="nlayers"):
        DINOHead(4, 5, nlayers=0)
