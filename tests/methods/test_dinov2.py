# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from functools import partial

import distillation_methods as cases
import pytest
import torch
from distillation_methods import centers
from torch.nn import functional as F

from sslkernels.methods import DINOv2
from sslkernels.nn import VisionTransformer
from sslkernels.reference.neighbors import koleo

new_method = partial(cases.new_method, DINOv2)


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(6, 4, 5, dtype=torch.bool)
    mask[0, 1, 2] = mask[3, :2, 1:3] = mask[5, 3, ::2] = True
    return mask


def exponential_form(logits: torch.Tensor, temp: float) -> torch.Tensor:
    """The published Sinkhorn-Knopp of logits (B, K)."""
    q = (logits / temp).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def written_out(method: DINOv2, crops: list[torch.Tensor], mask: torch.Tensor, *, sinkhorn: bool) -> dict:
    """The published sums: local and global class tokens under one divisor, masked patches, KoLeo of two crops."""
    temp, size, head, teacher = 0.07, len(crops[0]), method.heads[0], method.teacher.module
    images = torch.cat(crops[:2])
    tokens = method.masked_tokens(images, mask)
    center, patch_center = centers(method)
    hidden = mask.flatten(1)
    with torch.no_grad():
        targets = teacher.backbone.forward_features(images)
        cls, patches = teacher.head(targets[:, 0]), teacher.head(targets[:, 1:][hidden])
        if sinkhorn:
            p_cls, p_patches = exponential_form(cls, temp), exponential_form(patches, temp)
        else:
            p_cls = F.softmax((cls - center) / temp, dim=-1)
            p_patches = F.softmax((patches - patch_center) / temp, dim=-1)
    students = [*head(tokens[:, 0]).chunk(2), *(head(method.backbone(crop)) for crop in crops[2:])]
    divisor = 2 + 2 * (len(crops) - 2)  # two global terms, and the local ones
    dino = 0
    for v, student in enumerate(students):
        log_q = F.log_softmax(student / 0.1, dim=-1)
        for t in range(2):
            if t != v:
                dino = dino - (p_cls[t * size : (t + 1) * size] * log_q).sum(dim=-1).mean() / divisor
    weight = (1 / hidden.double().sum(dim=1, keepdim=True).clamp(min=1)).expand_as(hidden)[hidden]
    rows = (p_patches * F.log_softmax(head(tokens[:, 1:][hidden]) / 0.1, dim=-1)).sum(dim=-1)
    ibot = -(weight * rows).sum() / len(images)
    apart = koleo(tokens[:size, 0]) + koleo(tokens[size:, 0])
    return {
        "cls_loss": dino,
        "patch_loss": ibot,
        "koleo": apart,
        "loss": dino + ibot + 0.1 * apart,
        "centers": (0.9 * center + 0.1 * cls.mean(dim=0), 0.9 * patch_center + 0.1 * patches.mean(dim=0)),
    }


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_loss_is_dinov2s(fused_head, centering, crops, mask, monkeypatch):
    method = new_method(fused_head=fused_head, centering=centering)
    monkeypatch.setattr(method, "mask", lambda batch: mask)
    plain = copy.deepcopy(method)
    sinkhorn = centering == "sinkhorn_knopp"
    expected = written_out(plain, crops, mask, sinkhorn=sinkhorn)
    loss, metrics = method(crops)
    assert torch.equal(metrics["loss"], loss.detach())
    for name in ("loss", "cls_loss", "patch_loss", "koleo"):
        torch.testing.assert_close(metrics[name], expected[name].detach(), rtol=1e-9, atol=1e-12, msg=name)
    loss.backward()
    expected["loss"].backward()
    for (name, p), (_, q) in zip(method.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=name)
    assert method.heads[0].last_layer.weight_g.grad.abs().max() > 0  # the lengths are learned
    for now, before, moved in zip(centers(method), centers(plain), expected["centers"], strict=True):
        torch.testing.assert_close(now, before if sinkhorn else moved, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_nothing_masked(fused_head, centering, crops, mask, monkeypatch):
    """No masked patch, no patch loss, and a center that stays: the mean of no rows is not a number."""
    method = new_method(fused_head=fused_head, centering=centering)
    monkeypatch.setattr(method, "mask", lambda batch: torch.zeros_like(mask))
    before = centers(method)[1].clone()
    loss, metrics = method(crops)
    assert metrics["patch_loss"] == 0 and loss.isfinite() and torch.equal(centers(method)[1], before)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_masks_are_dinov2s():
    """Exactly half of the global crops, at most half of the patches, ratios spread over all of (0.1, 0.5)."""
    mask = new_method().mask([torch.zeros(64, 3, 56, 56)] * 2, seed=1)
    count = mask.flatten(1).sum(dim=1)
    assert mask.shape == (128, 14, 14) and (count > 0).sum() == 64 and count.max() <= 98
    assert count[count > 0].min() < 0.13 * 196 and count.max() > 0.45 * 196


def test_weights_of_the_terms(crops, mask, monkeypatch):
    method = new_method(dino_weight=0.5, ibot_weight=2.0, koleo_weight=0.0)
    monkeypatch.setattr(method, "mask", lambda batch: mask)
    loss, metrics = method(crops)
    torch.testing.assert_close(loss.detach(), 0.5 * metrics["cls_loss"] + 2 * metrics["patch_loss"])


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_autocast(fused_head, crops, mask, monkeypatch):
    """bfloat16 features, and loss and centers in float32."""
    method, crops = new_method(fused_head=fused_head).float(), [crop.float() for crop in crops]
    monkeypatch.setattr(method, "mask", lambda batch: mask)
    expected = copy.deepcopy(method)(crops)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(crops)
    assert loss.dtype == centers(method)[0].dtype == centers(method)[1].dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_defaults_and_refusals():
    method = DINOv2(VisionTransformer(embed_dim=16, depth=1))
    head = method.heads[0]
    assert head.last_layer.weight_v.shape == (65536, 256) and head.last_layer.weight_g.requires_grad
    assert (
        method.loss_weights == (1.0, 1.0, 0.1)
        and method.criterion.center_mode == "mean"
        and method.teacher.momentum_at(0) == 0.992
    )
    assert method.teacher_temps == method.patch_temps == (0.04, 0.07, 0)
    with pytest.raises(ValueError, match="centering"):
        DINOv2(VisionTransformer(), centering="mean")
    with pytest.raises(ValueError, match="class token"):
        DINOv2(VisionTransformer(class_token=False))
