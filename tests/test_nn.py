# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from sslkernels.nn import (
    MaskedDecoder,
    Predictor,
    ProjectionHead,
    ResidualCNN,
    TextTransformer,
    TransformerBlock,
    VisionTransformer,
    feature_dim,
    sincos_positions,
)

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


def vit(patch_size=(2, 4, 4), **options) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"in_chans": 3, "embed_dim": 24, "depth": 2, "num_heads": 3, **options}
    return VisionTransformer(patch_size=patch_size, **options).double()


CLIP, IMAGE = (2, 3, 4, 8, 12), (2, 3, 8, 12)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("patch_size", "shape"), [((4, 4), IMAGE), ((2, 4, 4), CLIP)], ids=["image", "clip"])
def test_vit_embeds_what_the_convolution_embeds(patch_size, shape, class_token):
    """Without blocks: conv + positions, the row-major grid, and only the patches asked for."""
    network = vit(patch_size, depth=0, class_token=class_token)
    x = torch.rand(shape, dtype=torch.float64)
    tokens = network.patch_embed(x).flatten(2).transpose(1, 2)
    tokens = network.norm(tokens + sincos_positions(network.grid(x), 24))
    prefix = int(class_token)
    torch.testing.assert_close(network.forward_features(x)[:, prefix:], tokens)
    ids = torch.tensor([[0, 5], [4, 1]])
    some = network.forward_features(x, ids)
    assert some.shape == (2, prefix + 2, 24)
    torch.testing.assert_close(some[:, prefix:], torch.stack([tokens[0, ids[0]], tokens[1, ids[1]]]))
    torch.testing.assert_close(network(x), tokens.mean(dim=1) if not class_token else network.forward_features(x)[:, 0])


def test_vit_attends_only_the_patches_asked_for():
    network, ids = vit((4, 4)), torch.tensor([[0, 5], [4, 1]])
    x = torch.rand(IMAGE, dtype=torch.float64)
    before = network.forward_features(x, ids)
    x[0, :, :4, 4:8] += 1  # patch 1, which only the second image is asked for
    torch.testing.assert_close(network.forward_features(x, ids), before)
    x[1, :, :4, 4:8] += 1
    assert not torch.allclose(network.forward_features(x, ids)[1], before[1])


def test_vit_takes_several_masks_of_one_image():
    network, ids = vit((4, 4)), torch.tensor([[[0, 5], [1, 2], [3, 4]], [[5, 4], [0, 1], [1, 3]]])
    x = torch.rand(IMAGE, dtype=torch.float64)
    expected = torch.stack([network.forward_features(x, ids[:, m]) for m in range(3)], dim=1).flatten(0, 1)
    torch.testing.assert_close(network.forward_features(x, ids), expected)


def test_vit_returns_what_the_last_blocks_add():
    network = vit((4, 4), depth=3)
    inputs, outputs = [], []
    for block in network.blocks:
        block.norm2.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
        block.mlp.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = torch.rand(IMAGE, dtype=torch.float64)
    tokens, layers = network.forward_features(x, return_layers=2)
    assert [layer is output for layer, output in zip(layers, outputs[1:], strict=True)] == [True, True]
    torch.testing.assert_close(tokens, network.norm(inputs[-1] + layers[-1]))
    torch.testing.assert_close(tokens, network.forward_features(x))
    with pytest.raises(ValueError, match="return_layers must be between 0 and the 3 blocks, got 4"):
        network.forward_features(x, return_layers=4)


def test_vit_scales_bytes():
    network = vit((4, 4)).float()
    x = torch.randint(256, IMAGE, dtype=torch.uint8)
    torch.testing.assert_close(network(x), network(x.float() / 255))


@pytest.mark.parametrize("shape", [(1, 3, 3, 8, 8), (1, 3, 4, 8, 6), IMAGE])
def test_vit_of_clips_refuses_by_the_patch(shape):
    with pytest.raises(ValueError, match=r"clip frames, height and width must be multiples of \(2, 4, 4\), got \("):
        vit()(torch.rand(shape))


@pytest.mark.parametrize("patch_size", [(4,), (0, 4), (1, 2, 3, 4)])
def test_vit_refuses_other_patches(patch_size):
    with pytest.raises(ValueError, match="patch_size"):
        VisionTransformer(patch_size=patch_size)


def test_positions_are_the_originals():
    """MAE's util/pos_embed.py with its two halves (its first is of the column), and V-JEPA's three sixths."""
    table = sincos_positions((3, 5), 16, device="cpu")
    assert table.shape == (15, 16)
    omega = 10_000.0 ** -(torch.arange(4) / 4)
    for row, (y, x) in zip(table, [(y, x) for y in range(3) for x in range(5)], strict=True):
        torch.testing.assert_close(row, torch.cat([f(c * omega) for c in (y, x) for f in (torch.sin, torch.cos)]))
    assert sincos_positions((2, 3, 4), 16).shape == (24, 16)  # six columns an axis, two of the last cut off
    assert len(sincos_positions((2, 3, 4), 24).unique(dim=0)) == 24


def test_masked_decoder_decodes_what_is_asked_for():
    torch.manual_seed(0)
    decoder = MaskedDecoder(12, 5, embed_dim=16, depth=0, num_prefix_tokens=1).double()
    tokens, visible = torch.rand(2, 3, 12, dtype=torch.float64), torch.tensor([[1, 4], [0, 5]])
    everything = decoder(tokens, visible, (2, 3))
    assert everything.shape == (2, 6, 5)
    x = decoder.mask_token.expand(2, 6, 16).clone()
    x[0, [1, 4]], x[1, [0, 5]] = decoder.embed(tokens)[0, 1:], decoder.embed(tokens)[1, 1:]
    torch.testing.assert_close(everything, decoder.head(decoder.norm(x + sincos_positions((2, 3), 16))))
    wanted = torch.tensor([[0, 2, 3, 5], [1, 2, 3, 4]])
    some = decoder(tokens, visible, (2, 3), wanted)
    torch.testing.assert_close(some, torch.stack([everything[0, wanted[0]], everything[1, wanted[1]]]))


def test_masked_decoder_lets_the_prefix_take_part():
    decoder = MaskedDecoder(12, 5, embed_dim=16, depth=1, num_prefix_tokens=1)
    tokens, visible = torch.rand(1, 3, 12), torch.tensor([[1, 4]])
    other = torch.cat([tokens[:, :1] + 1, tokens[:, 1:]], dim=1)
    assert not torch.allclose(decoder(tokens, visible, (2, 3)), decoder(other, visible, (2, 3)), atol=1e-5)


def test_predictor_predicts_every_block_on_its_own():
    torch.manual_seed(0)
    predictor = Predictor(12, out_dim=7, embed_dim=16, depth=2, num_mask_tokens=2).double()
    context, context_ids = torch.rand(2, 3, 12, dtype=torch.float64), torch.tensor([[1, 4, 5], [0, 2, 5]])
    targets = torch.tensor([[[0, 2], [2, 3]], [[1, 3], [3, 4]]])
    both = predictor(context, context_ids, targets, (2, 3))
    assert both.shape == (2, 2, 2, 7)
    alone = [predictor(context, context_ids, targets[:, m], (2, 3)) for m in range(2)]
    torch.testing.assert_close(both, torch.stack(alone, dim=1))
    assert not torch.allclose(both, predictor(context, context_ids, targets, (2, 3), mask=1), atol=1e-5)
    # written out for the second image's first block
    positions = sincos_positions((2, 3), 16).double()
    x = torch.cat([predictor.embed(context[1]) + positions[[0, 2, 5]], predictor.mask_tokens[0] + positions[[1, 3]]])
    torch.testing.assert_close(both[1, 0], predictor.project(predictor.norm(predictor.blocks(x[None])[0, 3:])))


def text_transformer(**options) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(50, max_length=12, embed_dim=16, depth=2, num_heads=2, **options).eval()


def test_block_sees_what_the_mask_lets_it():
    torch.manual_seed(0)
    block, x = TransformerBlock(16, 2, 2.0), torch.rand(2, 5, 16)
    y = torch.cat([x[:, :3], torch.rand(2, 2, 16)], dim=1)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(block(x, causal)[:, :3], block(y, causal)[:, :3])
    assert not torch.allclose(block(x)[:, :3], block(y)[:, :3], atol=1e-3)
    torch.testing.assert_close(block(x, torch.ones_like(causal)), block(x))


def test_text_transformer_ignores_padding_and_nothing_else():
    encoder = text_transformer()
    tokens = torch.tensor([[7, 8, 9, 10, 11, 12]])
    padded = torch.nn.functional.pad(tokens, (0, 3))
    torch.testing.assert_close(encoder(padded), encoder(tokens))
    torch.testing.assert_close(encoder.forward_features(padded)[:, :6], encoder.forward_features(tokens))
    assert torch.equal(encoder.valid(padded), padded != 0)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    for other in (encoder(tokens.flip(1)), encoder(tokens, segments), encoder(tokens + 1)):
        assert not torch.allclose(other, encoder(tokens), atol=1e-3)
    torch.testing.assert_close(encoder(tokens, torch.zeros_like(segments)), encoder(tokens))
    assert encoder(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()  # nothing but padding


def test_text_transformer_pools_the_first_token_or_the_mean():
    tokens = torch.tensor([[7, 8, 9, 0], [7, 8, 9, 10]])
    first, mean = text_transformer(pool="first"), text_transformer()
    states = mean.forward_features(tokens)
    assert torch.equal(first(tokens), states[:, 0])
    torch.testing.assert_close(mean(tokens), torch.stack([states[0, :3].mean(0), states[1].mean(0)]))


def test_text_transformer_refuses():
    with pytest.raises(ValueError, match=r"at most 12 long, got \(2, 13\)"):
        text_transformer()(torch.ones(2, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="pool"):
        text_transformer(pool="max")
    with pytest.raises(ValueError, match="num_heads=3"):
        TextTransformer(50, embed_dim=16, num_heads=3)
