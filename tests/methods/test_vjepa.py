# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sslkernels import data
from sslkernels.methods import VJEPA
from sslkernels.nn import VisionTransformer, sincos_positions
from sslkernels.ops import multiblock3d_mask


def vjepa(**options) -> VJEPA:
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=(2, 4, 4), embed_dim=24, depth=1, num_heads=2, class_token=False)
    method = VJEPA(backbone, **{"predictor_dim": 16, "predictor_depth": 1, "predictor_heads": 2, **options})
    with torch.no_grad():  # as after some steps: the two encoders differ, and so do the two mask tokens
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        method.predictor.mask_tokens.normal_()
    return method


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return data.clips(size=24, frames=4, train_clips=3, test_clips=1).train_clips  # a grid of (2, 6, 6)


def test_loss_is_the_originals(clips):
    """app/vjepa/train.py in float64 on the same masks: norm, then gather; L1 for each mask, mean over the masks."""
    method = vjepa().double()
    clips = clips.double()
    loss, metrics = method(clips, generator=torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    teacher, backbone, predictor = method.teacher.module, method.backbone, method.predictor
    positions = sincos_positions((2, 6, 6), 16).double()

    def tokens(network):
        return network.patch_embed(clips).flatten(2).transpose(1, 2) + network.positions(clips)

    h = F.layer_norm(teacher.norm(teacher.blocks(tokens(teacher))), (24,))
    expected = []
    for i, (blocks, scale) in enumerate(((8, 0.15), (2, 0.7))):
        context, target = multiblock3d_mask(
            3, (2, 6, 6), blocks=blocks, spatial_scale=(scale, scale), generator=generator
        )
        parts = []
        for b in range(3):
            x = predictor.embed(backbone.norm(backbone.blocks(tokens(backbone)[b : b + 1, context[b]])))
            x = torch.cat([x[0] + positions[context[b]], predictor.mask_tokens[i] + positions[target[b]]])
            z = predictor.project(predictor.norm(predictor.blocks(x[None])[0, context.shape[1] :]))
            parts.append((z - h[b, target[b]]).abs())
        expected.append(torch.stack(parts).mean())
    torch.testing.assert_close(loss, (expected[0] + expected[1]) / 2, rtol=1e-6, atol=0)
    assert [metrics["mask0"], metrics["mask1"]] == pytest.approx([x.item() for x in expected], rel=1e-6)


def test_teacher_moves_after_the_step_and_gets_no_gradient(clips):
    method = vjepa(momentum=0.9)
    before = copy.deepcopy(method.teacher.module)
    method(clips)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), method.teacher.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    trained = [*method.backbone.parameters(), *method.predictor.parameters()]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    method.after_step(0)
    for old, new, source in zip(
        before.parameters(), method.teacher.parameters(), method.backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source)


def test_momentum_is_constant_or_linear():
    """V-JEPA 2's 0.99925 at every step; V-JEPA's from 0.998 to 1 in equal steps."""
    constant, linear = vjepa(), vjepa(momentum=0.998, final_momentum=1.0, total_steps=100)
    assert [constant.teacher.momentum_at(step) for step in (0, 1000)] == [0.99925, 0.99925]
    assert [linear.teacher.momentum_at(step) for step in (0, 50, 100, 200)] == pytest.approx([0.998, 0.999, 1, 1])


def test_features_are_the_teachers(clips):
    method = vjepa()
    features = method.encode(clips)
    torch.testing.assert_close(features, method.teacher.module.forward_features(clips).mean(dim=1))
    assert not torch.allclose(features, method.backbone(clips), atol=1e-3)


def test_defaults_are_the_originals():
    torch.manual_seed(0)
    method = VJEPA(VisionTransformer(patch_size=(2, 16, 16), embed_dim=24, depth=0, num_heads=2, class_token=False))
    assert method.predictor.embed.out_features == 384 and len(method.predictor.blocks) == 12
    assert torch.equal(method.predictor.mask_tokens, torch.zeros(2, 384))
    assert [(m["blocks"], m["spatial_scale"]) for m in method.masks] == [(8, (0.15, 0.15)), (2, (0.7, 0.7))]


def test_refuses():
    with pytest.raises(ValueError, match="no class token"):
        VJEPA(VisionTransformer(patch_size=(2, 4, 4)))
    with pytest.raises(ValueError, match="must take clips"):
        VJEPA(VisionTransformer(patch_size=4, class_token=False))
    with pytest.raises(ValueError, match="masks is empty"):
        vjepa(masks=())
