# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslkernels.methods import IJEPA
from sslkernels.nn import VisionTransformer


@pytest.fixture
def method() -> IJEPA:
    torch.manual_seed(0)
    backbone = VisionTransformer(embed_dim=16, depth=2, num_heads=2, class_token=False)
    return IJEPA(backbone, predictor_dim=8, predictor_depth=1, predictor_heads=2, momentum=0.9, total_steps=10)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 24)


def test_loss_is_ijepas(method, images, monkeypatch):
    """Target: layer norm of all the teacher's tokens, then the blocks'; smooth L1, mean over all elements."""
    context, blocks = method.masks(images, seed=1)
    monkeypatch.setattr(method, "masks", lambda batch: (context, blocks))
    loss, metrics = method(images)
    with torch.no_grad():
        h = method.teacher.module.forward_features(images).double()
        z = method.backbone.forward_features(images, context)
        prediction = method.predictor(z, context, blocks, (8, 6)).double()
    h = F.layer_norm(h, h.shape[-1:])
    target = torch.stack([torch.stack([h[b, block] for block in blocks[b]]) for b in range(3)])  # (B, 4, T, D)
    torch.testing.assert_close(loss.detach().double(), F.smooth_l1_loss(prediction, target), rtol=1e-5, atol=0)
    assert target.shape == (3, 4, blocks.shape[2], 16) and metrics["spread"] > 0


def test_masks_are_ijepas(method, images):
    context, blocks = method.masks(images, seed=1)
    assert blocks.shape[:2] == (3, 4) and context.shape[1] > 10
    for sample in range(3):
        assert not set(context[sample].tolist()) & set(blocks[sample].flatten().tolist())
    few = IJEPA(method.backbone, predictor_depth=1, mask_options={"targets": 2}).masks(images, seed=1)
    assert few[1].shape[1] == 2


def test_blocks_do_not_see_each_other(method, images):
    """Each is predicted from the context alone: it comes out the same when the others are taken away."""
    context, blocks = method.masks(images, seed=1)
    with torch.no_grad():
        together, _ = method.predict(images, context, blocks)
        alone, _ = method.predict(images, context, blocks[:, 2:3])
    torch.testing.assert_close(together[:, 2:3], alone, rtol=1e-4, atol=1e-6)


def test_backbone_sees_the_context_alone(method, images):
    context, blocks = method.masks(images, seed=1)
    hidden = torch.ones(3, 48, dtype=torch.bool).scatter(1, context, False).view(3, 1, 8, 6)
    changed = images + 5 * hidden.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    with torch.no_grad():
        prediction, target = method.predict(images, context, blocks)
        same, other = method.predict(changed, context, blocks)
    assert torch.equal(prediction, same) and not torch.allclose(target, other)


def test_gradient_and_teacher(method, images):
    loss, _ = method(images)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    used = [*method.backbone.parameters(), *method.predictor.parameters()]
    assert all(p.grad is not None for p in used)
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(1)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(4)  # 0.9 to 1 in 10 equal steps
    for now, old, online in zip(method.teacher.parameters(), before, method.backbone.parameters(), strict=True):
        torch.testing.assert_close(now, 0.94 * old + 0.06 * online, rtol=1e-5, atol=1e-6)
    method.after_step(10)
    assert method.teacher.momentum_at(10) == 1
    assert IJEPA(method.backbone, predictor_depth=1).teacher.momentum_at(99) == 0.996


def test_encodes_with_the_teacher(method, images):
    with torch.no_grad():
        expected = method.teacher.module.forward_features(images).mean(dim=1)
    torch.testing.assert_close(method.encode(images), expected)


def test_refuses_a_class_token():
    with pytest.raises(ValueError, match="class_token=False"):
        IJEPA(VisionTransformer())
