# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from sslkernels.methods import Data2Vec
from sslkernels.nn import ConvolutionalDecoder, VisionTransformer
from sslkernels.ops import inverse_block_mask


def small(**options) -> Data2Vec:
    torch.manual_seed(0)
    backbone = VisionTransformer(embed_dim=16, depth=4, num_heads=2)
    options = {"masks": 3, "momentum": 0.9, "final_momentum": 0.99, "anneal_steps": 9, **options}
    return Data2Vec(backbone, decoder_depth=2, decoder_groups=4, **options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def targets(method: Data2Vec, images: torch.Tensor) -> torch.Tensor:
    """make_targets, in float64: per layer an instance norm over the patches, their mean, a layer norm."""
    kept = []
    teacher = copy.deepcopy(method.teacher.module)
    for block in teacher.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: kept.append(output))
    teacher(images)
    layers = [layer[:, 1:].double().transpose(1, 2) for layer in kept[-method.layers :]]  # without the class token
    y = sum(F.instance_norm(layer) for layer in layers).transpose(1, 2) / len(layers)
    return F.layer_norm(y, y.shape[-1:])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_is_data2vecs(images, beta, monkeypatch):
    """Sums over D by 1 / sqrt(D): per hidden patch their mean, and 0.01 of the sum over the 6 class tokens."""
    method = small(beta=beta)
    visible, hidden = (x.unflatten(0, (2, 3)) for x in inverse_block_mask(6, (8, 8), seed=1))
    monkeypatch.setattr(
        "sslkernels.methods.data2vec.inverse_block_mask", lambda *a, **k: (visible.flatten(0, 1), hidden.flatten(0, 1))
    )
    torch.manual_seed(5)  # of the noise
    loss, metrics = method(images)
    torch.manual_seed(5)
    with torch.no_grad():
        prediction, prefix = method.predict(images, visible, hidden)
        y = targets(method, images)

    def total(x, t):
        if beta:
            return F.smooth_l1_loss(x.double(), t, beta=beta, reduction="sum") / 16**0.5
        return (x.double() - t).square().sum() / 16**0.5

    expected = y.new_zeros(())
    for b in range(2):
        for m in range(3):
            expected += total(prediction[b, m], y[b, hidden[b, m]]) / hidden.numel()
            expected += 0.01 * total(prefix[b, m, 0], y[b].mean(dim=0))
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    std = y.flatten(0, 1).std(dim=0).mean()
    torch.testing.assert_close(metrics["target_std"].double(), std, rtol=1e-4, atol=0)


def test_backbone_sees_the_visible_patches_alone(images):
    """And the decoder gets noise where the others are, a new draw each time, of deviation 0.01."""
    method = small(noise=0.0)
    visible, hidden = (x.unflatten(0, (2, 3)) for x in inverse_block_mask(6, (8, 8), seed=1))
    assert visible.shape == (2, 3, 12) and hidden.shape == (2, 3, 52)
    alone = small(noise=0.0, masks=1)
    seen = torch.zeros(2, 64).scatter(1, visible[:, 1], 1).view(2, 1, 8, 8)
    changed = images * seen.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    with torch.no_grad():
        prediction, prefix = method.predict(images, visible, hidden)
        same, same_prefix = alone.predict(changed, visible[:, 1:2], hidden[:, 1:2])
    torch.testing.assert_close(prediction[:, 1:2], same, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prefix[:, 1:2], same_prefix, rtol=1e-4, atol=1e-6)

    inputs = []
    method = small()
    method.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        method.predict(images, visible, hidden)
        tokens = method.backbone.forward_features(images, visible)[:, 1:]
    at = visible.flatten(0, 1)[..., None].expand(-1, -1, 16)
    assert torch.equal(inputs[0].gather(1, at), tokens)
    noise = inputs[0].gather(1, hidden.flatten(0, 1)[..., None].expand(-1, -1, 16))
    assert abs(noise.std() / 0.01 - 1) < 0.05 and noise.mean().abs() < 1e-3


def test_what_ranks_draw_for_each_other_is_small(images, monkeypatch):
    """The noise is as wide as the features: of the rows of other ranks only the seeds are drawn."""
    method, drawn = small(), []
    draw = method.draw

    def record(x, function):
        drawn.extend(leaf for leaf in tree_leaves(function(len(x))))
        return draw(x, function)

    monkeypatch.setattr(method, "draw", record)
    method(images)
    patches = 3 * 64  # masks an image, patches
    assert drawn and all(x.shape[0] == 2 and x.numel() <= 2 * patches for x in drawn)
    monkeypatch.undo()

    noise = torch.empty(2, 3, 4, 5)
    torch.manual_seed(0)
    both = method.draw_noise(images, noise).clone()
    assert not torch.equal(both[0], both[1])
    torch.manual_seed(0)
    monkeypatch.setattr(method, "draw", lambda x, function: function(2)[1:])  # the second rank of two
    assert torch.equal(method.draw_noise(images[1:], noise[1:]), both[1:])


def test_decoder_is_a_residual_of_convolutions():
    torch.manual_seed(0)
    decoder = ConvolutionalDecoder(8, depth=2, groups=4)
    tokens, ids = torch.randn(2, 12, 8), torch.tensor([[0, 7], [11, 3]])
    x = tokens.transpose(1, 2).reshape(2, 8, 3, 4)
    for conv in decoder.blocks:
        y = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=4)
        y = F.layer_norm(y.movedim(1, -1), (8,)).movedim(-1, 1)
        x = x + F.gelu(y)
    expected = decoder.project(x.flatten(2).transpose(1, 2))
    got = decoder(tokens, (3, 4), ids)
    torch.testing.assert_close(got, torch.stack([expected[0, ids[0]], expected[1, ids[1]]]), rtol=1e-4, atol=1e-5)
    full = ConvolutionalDecoder(64)
    assert [conv.groups for conv in full.blocks] == [16] * 6


def test_teacher_is_in_evaluation_mode_and_follows(images):
    method = small()
    assert method.training and not any(part.training for part in method.teacher.modules())
    assert not method.train().teacher.module.training and method.layers == 2
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(1)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(0)  # the original counts from 1: 0.9 + 0.09 / 9
    for now, old, online in zip(method.teacher.parameters(), before, method.backbone.parameters(), strict=True):
        torch.testing.assert_close(now, 0.91 * old + 0.09 * online, rtol=1e-5, atol=1e-6)
    loss, _ = method(images)
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    unused = {"norm.bias", "norm.weight"} - {n for n, p in method.backbone.named_parameters() if p.grad is not None}
    assert not unused and all(p.grad is not None for p in method.decoder.parameters())


def test_teacher_of_16_bit_weights_is_in_float32():
    method = Data2Vec(VisionTransformer(embed_dim=16, depth=2, num_heads=2).to(torch.bfloat16), masks=1)
    assert {p.dtype for p in method.teacher.parameters()} == {torch.float32}
    assert method.targets(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.float32
    assert method.teacher.momentum_at(0) == 0.9998 and method.teacher.momentum_at(10**6) == 0.99999


def test_refuses_a_backbone_without_class_token():
    backbone = VisionTransformer(embed_dim=16, depth=2, num_heads=2, class_token=False)
    with pytest.raises(ValueError, match="class token"):
        Data2Vec(backbone)
    loss, _ = Data2Vec(backbone, masks=1, cls_weight=0)(torch.randn(2, 3, 32, 32))
    assert loss.isfinite()
