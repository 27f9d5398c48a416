# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from sslkernels.nn import ProjectionHead, ResidualCNN, VisionTransformer, feature_dim

BACKBONES = {
    "cnn": lambda in_chans: ResidualCNN(in_chans=in_chans, channels=(8, 16), blocks=2),
    "vit": lambda in_chans: VisionTransformer(in_chans=in_chans, patch_size=4, embed_dim=24, depth=2, num_heads=3),
}


# The smallest image of one patch, one that is not square, and an unusual number of channels.
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 3, 8, 20), (1, 5, 32, 16)])
@pytest.mark.parametrize("name", BACKBONES)
def test_any_size_and_channels(name, shape):
    backbone = BACKBONES[name](shape[1])
    features = backbone(torch.rand(shape))
    assert features.shape == (shape[0], backbone.dim)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", BACKBONES)
def test_state_dict_round_trip(name):
    torch.manual_seed(0)
    backbone, other = BACKBONES[name](3), BACKBONES[name](3)
    images = torch.rand(4, 3, 16, 16)
    backbone(images)  # moves the batch norm statistics
    assert not torch.equal(backbone.eval()(images), other.eval()(images))
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(backbone(images), other(images))


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_reaches_every_parameter(name):
    backbone = BACKBONES[name](1)
    backbone(torch.rand(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_vit_serves_two_sizes_and_tells_positions_apart():
    torch.manual_seed(0)
    vit = BACKBONES["vit"](1)
    image = torch.rand(1, 1, 8, 8)
    assert vit.forward_features(image).shape == (1, 5, 24)
    assert vit.forward_features(torch.rand(1, 1, 16, 8)).shape == (1, 9, 24)
    # Swapping the two halves permutes the patches: without positions the class token would not notice.
    assert not torch.allclose(vit(image), vit(image.roll(4, dims=3)), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 6, 8), (1, 1, 8, 6)])
def test_vit_refuses_half_patches(shape):
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 1"):
        BACKBONES["vit"](1)(torch.rand(shape))


@pytest.mark.parametrize("options", [{"embed_dim": 30}, {"embed_dim": 32, "num_heads": 3}])
def test_vit_refuses_widths_that_do_not_divide(options):
    with pytest.raises(ValueError, match="embed_dim"):
        VisionTransformer(**options)


@pytest.mark.parametrize("options", [{"channels": ()}, {"blocks": 0}])
def test_cnn_refuses_no_layers(options):
    with pytest.raises(ValueError, match="stage"):
        ResidualCNN(**options)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_projection_head(layers, batch_norm):
    head = ProjectionHead(6, 5, hidden_dim=7, num_layers=layers, batch_norm=batch_norm)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [6, 7, 7][:layers]
    assert sum(isinstance(layer, nn.ReLU) for layer in head) == layers - 1
    out = head(torch.randn(4, 6))
    assert out.shape == (4, 5) and head.dim == 5
    out.square().sum().backward()
    if batch_norm:  # without its shift the last layer's output has mean zero
        torch.testing.assert_close(out.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-6)


def test_projection_head_refuses_no_layers():
    with pytest.raises(ValueError, match="num_layers"):
        ProjectionHead(6, 5, num_layers=0)


def test_feature_dim_knows_the_usual_names():
    timm_like = nn.Identity()
    timm_like.num_features = 7
    assert feature_dim(ResidualCNN(channels=(8,))) == 8
    assert feature_dim(nn.EmbeddingBag(10, 6)) == 6
    assert feature_dim(timm_like) == 7
    with pytest.raises(ValueError, match="Identity"):
        feature_dim(nn.Identity())
