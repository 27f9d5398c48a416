# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from functools import partial

import distillation_methods as cases
import pytest
import torch
from distillation_methods import centers
from torch.nn import functional as F

from sslkernels.methods import IBOT
from sslkernels.nn import VisionTransformer

new_method = partial(cases.new_method, IBOT)


@pytest.fixture
def mask() -> torch.Tensor:
    """Of the 6 global crops: one patch, none, all, and several."""
    mask = torch.zeros(6, 4, 5, dtype=torch.bool)
    mask[0, 1, 2] = mask[2] = mask[3, :2, 1:3] = mask[5, 3, ::2] = True
    return mask


def student_tokens(method: IBOT, crop: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens before the head, with the mask token put in by hand where mask (B, h, w) is True."""
    backbone = method.backbone
    x = backbone.patch_embed(crop).flatten(2).transpose(1, 2).clone()
    if mask is not None:
        for b, place in mask.flatten(1).nonzero().tolist():
            x[b, place] = method.mask_token
    x = torch.cat([backbone.cls_token.expand(len(x), -1, -1), x + backbone.positions(crop)], dim=1)
    return backbone.norm(backbone.blocks(x))


def cross_entropy(teacher: torch.Tensor, center: torch.Tensor, temp: float, student: torch.Tensor) -> torch.Tensor:
    return -(F.softmax((teacher - center) / temp, dim=-1) * F.log_softmax(student / 0.1, dim=-1)).sum(dim=-1)


def written_out(method: IBOT, crops: list[torch.Tensor], mask: torch.Tensor, patch_temp: float = 0.07) -> tuple:
    """The published loops, pairs of crops for class tokens and the same crop for patches; the teacher's mean logits."""
    head, teacher = method.heads[0], method.teacher.module
    masks = [*mask.chunk(2), None, None]
    tokens = [head(student_tokens(method, crop, m)) for crop, m in zip(crops, masks, strict=True)]
    with torch.no_grad():
        targets = [teacher.head(teacher.backbone.forward_features(crop)) for crop in crops[:2]]
    cls, patch, terms = 0, 0, 0
    center, patch_center = centers(method)
    for t, target in enumerate(targets):
        for v, student in enumerate(tokens):
            if v != t:
                cls = cls + cross_entropy(target[:, 0], center, 0.04, student[:, 0]).mean()
                terms += 1
                continue
            rows = cross_entropy(target[:, 1:], patch_center, patch_temp, student[:, 1:])
            hidden = masks[v].flatten(1).double()
            patch = patch + ((rows * hidden).sum(dim=1) / hidden.sum(dim=1).clamp(min=1)).mean()
    both = torch.cat(targets)
    return cls / terms, patch / 2, both[:, 0].mean(dim=0), both[:, 1:].flatten(0, 1).mean(dim=0)


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_loss_is_ibots(fused_head, crops, mask, monkeypatch):
    method = new_method(fused_head=fused_head)
    monkeypatch.setattr(method, "mask", lambda batch: mask)
    plain = copy.deepcopy(method)
    cls, patch, mean, patch_mean = written_out(plain, crops, mask)
    loss, metrics = method(crops)
    for value, expected in ((loss, cls + patch), (metrics["cls_loss"], cls), (metrics["patch_loss"], patch)):
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-10, atol=0)
    loss.backward()
    (cls + patch).backward()
    for (name, p), q in zip(method.named_parameters(), plain.named_parameters(), strict=True):
        if q[1].grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-8, atol=1e-10, msg=name)
    assert method.mask_token.grad.abs().max() > 0
    # each center by its own tokens, the patches' by all of them, masked or not
    for now, before, batch in zip(centers(method), centers(plain), (mean, patch_mean), strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * batch, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_nothing_masked(fused_head, crops, mask, monkeypatch):
    """The patch term is 0 and DINO's is left; the center of the patches still moves."""
    method = new_method(fused_head=fused_head)
    monkeypatch.setattr(method, "mask", lambda batch: torch.zeros_like(mask))
    before = centers(method)[1].clone()
    cls, patch, _, patch_mean = written_out(method, crops, torch.zeros_like(mask))
    assert patch == 0
    loss, metrics = method(crops)
    assert metrics["patch_loss"] == 0
    torch.testing.assert_close(loss, cls, rtol=1e-10, atol=0)
    loss.backward()
    assert method.mask_token.grad is None or method.mask_token.grad.abs().max() == 0
    torch.testing.assert_close(centers(method)[1], 0.9 * before + 0.1 * patch_mean, rtol=1e-10, atol=1e-12)


def test_masks_are_ibots(crops):
    """About half of the global crops, at most half of the patches of each, and others at every step."""
    method = new_method()
    many = [torch.zeros(200, 3, 56, 56)] * 2
    mask = method.mask(many, seed=1)
    assert mask.shape == (400, 14, 14) and mask.device.type == "cpu"
    count = mask.flatten(1).sum(dim=1)
    assert 160 < (count > 0).sum() < 240 and count.max() <= 98
    assert not torch.equal(method.mask(many), method.mask(many))
    assert new_method(mask_options={"probability": 1.0}).mask(many, seed=1).flatten(1).any(dim=1).all()


def test_student_does_not_see_what_is_masked(crops, mask):
    method = new_method()
    images = torch.cat(crops[:2])
    hidden = mask[:, None].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    with torch.no_grad():
        tokens = method.masked_tokens(images, mask)
        torch.testing.assert_close(tokens, method.masked_tokens(images + 5 * hidden, mask))
        assert not torch.allclose(tokens, method.masked_tokens(images + 5 * ~hidden, mask))


def test_temperatures():
    method = new_method(warmup_teacher_temp=0.03, teacher_temp=0.05, patch_temp=0.09, warmup_teacher_temp_steps=3)
    for step, expected in enumerate([(0.03, 0.03), (0.04, 0.06), (0.05, 0.09), (0.05, 0.09)]):
        got = method.temperature(*method.teacher_temps), method.temperature(*method.patch_temps)
        assert got == pytest.approx(expected)
        method.after_step(step)


def test_defaults_and_refusal():
    method = IBOT(VisionTransformer(embed_dim=16, depth=1))
    assert centers(method)[0].shape == centers(method)[1].shape == (8192,)
    assert method.teacher_temps == (0.04, 0.04, 0) and method.patch_temps == (0.04, 0.07, 0)
    assert not any("mask_token" in name for name, _ in method.teacher.named_parameters())
    with pytest.raises(ValueError, match="class token"):
        IBOT(VisionTransformer(class_token=False))


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_sinkhorn_needs_no_centers(fused_head, crops, mask, monkeypatch):
    method = new_method(fused_head=fused_head, center_mode="sinkhorn_knopp")
    monkeypatch.setattr(method, "mask", lambda batch: mask)
    before = [center.clone() for center in centers(method)]
    loss, metrics = method(crops)
    loss.backward()
    assert loss.isfinite() and metrics["patch_loss"] > 0
    assert all(torch.equal(now, old) for now, old in zip(centers(method), before, strict=True))
