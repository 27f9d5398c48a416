# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslkernels.methods import DINO
from sslkernels.methods._distillation import teacher_metrics
from sslkernels.nn import ResidualCNN, VisionTransformer

HEAD = {"hidden_dim": 12, "bottleneck_dim": 6}
OUT = 17


def new_method(**options) -> DINO:
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=16, depth=1, num_heads=2)
    return DINO(backbone, **{"out_dim": OUT, "head_options": HEAD, "momentum": 0.9, "total_steps": 10, **options})


@pytest.fixture
def crops() -> list[torch.Tensor]:
    """Two global and three local crops of 5 images, the local ones not square."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 3, 16, 16)] * 2 + [(5, 3, 8, 12)] * 3
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def apart(method: DINO) -> DINO:
    """In float64, with a teacher and a center of its own."""
    method.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (*method.teacher.parameters(), method.criterion.center):
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for p in method.student.parameters():  # of a size at which crops differ
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return method


def written_out(method: DINO, crops: list[torch.Tensor]) -> torch.Tensor:
    """The published loop over pairs, crop by crop through the plain networks."""
    total, pairs = 0, 0
    for t, crop in enumerate(crops[:2]):
        with torch.no_grad():
            target = F.softmax((method.teacher(crop) - method.criterion.center[0, 0]) / 0.04, dim=-1)
        for v, other in enumerate(crops):
            if v != t:
                total = total - (target * F.log_softmax(method.student(other) / 0.1, dim=-1)).sum(dim=-1).mean()
                pairs += 1
    assert pairs == 2 * (len(crops) - 1)
    return total / pairs


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_loss_is_dinos(fused_head, count, crops):
    """With the center from before the batch, which then moves; gradients of every parameter of the student."""
    method, crops = apart(new_method(fused_head=fused_head)), crops[:count]
    plain = copy.deepcopy(method)
    expected = written_out(plain, crops)
    loss, _ = method(crops)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(method.student.named_parameters(), plain.student.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (name == "head.last_layer.weight_g"), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())

    with torch.no_grad():
        batch = torch.cat([plain.teacher(crop) for crop in crops[:2]]).mean(dim=0)
    torch.testing.assert_close(
        method.criterion.center[0, 0], 0.9 * plain.criterion.center[0, 0] + 0.1 * batch, rtol=1e-10, atol=0
    )
    assert not torch.allclose(written_out(method, crops), expected, rtol=1e-7)  # the center tells


def test_one_pass_for_each_size(crops):
    """The backbone sees the global crops together and the local ones together, the head all rows at once."""
    method, seen = new_method().double(), []
    student, teacher = method.student, method.teacher.module
    student.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    student.head.mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    teacher.backbone.register_forward_pre_hook(lambda _, args: seen.append(("teacher", *args[0].shape)))
    method(crops)
    assert sorted(seen, key=str) == [("teacher", 10, 3, 16, 16), (10, 3, 16, 16), (15, 3, 8, 12), (25, 16)]


def test_teacher_follows_along_a_cosine_after_the_step(crops):
    method = new_method().double()
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(3)
    momentum = 1 - (1 - 0.9) * (1 + math.cos(math.pi * 3 / 10)) / 2
    for now, old, student in zip(method.teacher.parameters(), before, method.student.parameters(), strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * student)
    assert method.teacher.momentum_at(10) == 1 and new_method(total_steps=None).teacher.momentum_at(10**6) == 0.9
    assert DINO(method.backbone, out_dim=4).teacher.momentum_at(0) == 0.996


def test_teacher_keeps_statistics_of_its_own(crops):
    """Parameters alone are averaged: batch norm of the teacher has seen the global crops only."""
    torch.manual_seed(0)
    method = DINO(ResidualCNN(channels=(8,)), out_dim=OUT, head_options={**HEAD, "use_bn": True})
    method([crop.float() for crop in crops])
    student, teacher = method.backbone.bn, method.teacher_backbone.bn
    assert not torch.equal(student.running_mean, teacher.running_mean)
    kept = teacher.running_mean.clone()
    method.after_step(0)
    assert torch.equal(teacher.running_mean, kept)
    assert method.heads[1].mlp[1].running_mean.abs().max() > 0


def test_temperature_is_a_line_of_steps():
    method = new_method(warmup_teacher_temp=0.02, teacher_temp=0.06, warmup_teacher_temp_steps=5)
    schedule = []
    for _ in range(8):
        schedule.append(method.temperature(*method.teacher_temps))
        method.after_step(len(schedule) - 1)
    np.testing.assert_allclose(schedule, [*np.linspace(0.02, 0.06, 5), 0.06, 0.06, 0.06])
    constant = new_method(warmup_teacher_temp=0.02, teacher_temp=0.06)
    assert constant.temperature(*constant.teacher_temps) == 0.06


def test_temperature_reaches_the_loss(crops):
    cold = apart(new_method(warmup_teacher_temp=0.01, warmup_teacher_temp_steps=3))
    usual = apart(new_method())
    first = [method(crops)[0] for method in (cold, usual)]
    assert not torch.isclose(*first)
    for method in (cold, usual):
        method.criterion.center.zero_()
        for step in range(2):
            method.after_step(step)
    torch.testing.assert_close(cold(crops)[0], usual(crops)[0])  # the third step is the end of the line


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused"])
def test_last_layer_waits(crops, fused_head):
    method = new_method(freeze_last_layer_steps=2, fused_head=fused_head).double()
    last, first = method.heads[0].last_layer.weight_v, method.heads[0].mlp[0].weight
    for step, expected in enumerate([False, False, True]):
        method.zero_grad()
        method(crops)[0].backward()
        assert (last.grad is not None) == expected and first.grad is not None
        method.after_step(step)


def test_metrics_tell_collapse():
    torch.manual_seed(0)
    z, weight = F.normalize(torch.randn(40, 6), dim=1), F.normalize(torch.randn(OUT, 6), dim=1)
    p = ((z[:32] @ weight.T - 0.1) / 0.04).double().softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1).mean()
    divergence = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean()
    metrics = teacher_metrics(z, weight, torch.full((OUT,), 0.1), 0.04)
    torch.testing.assert_close(metrics["teacher_entropy"].double(), entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["teacher_kl"].double(), divergence, rtol=1e-4, atol=0)
    alike = z[:1].expand(40, -1)
    one = teacher_metrics(alike, weight, torch.zeros(OUT), 0.001)  # one prototype
    assert one["teacher_entropy"] < 0.1 and one["teacher_kl"] < 1e-5
    for center in (alike[0] @ weight.T, None):  # centred away, by the mean and by Sinkhorn
        none = teacher_metrics(alike, weight, center, 0.04)
        assert none["teacher_entropy"] > math.log(OUT) - 1e-5 and none["teacher_kl"] < 1e-5


@pytest.mark.parametrize("sizes", [[(4, 16)], [(4, 16), (4, 8)], [(4, 16), (4, 16), (3, 8)]], ids=str)
def test_refuses_crops(sizes):
    """One alone, two global ones of different sizes, crops of other images."""
    with pytest.raises(ValueError, match="crops must be two global ones"):
        new_method()([torch.zeros(count, 3, side, side) for count, side in sizes])


def test_encodes_with_the_teacher(crops):
    method = apart(new_method())
    assert torch.equal(method.encode(crops[0]), method.teacher.module.backbone(crops[0]))
    assert not torch.allclose(method.encode(crops[0]), method.backbone(crops[0]))


def test_defaults_are_the_papers():
    method = DINO(VisionTransformer(embed_dim=16, depth=1))
    head = method.heads[0]
    assert head.last_layer.weight_v.shape == (65536, 256) and not head.last_layer.weight_g.requires_grad
    assert [layer.out_features for layer in head.mlp if hasattr(layer, "out_features")] == [2048, 2048, 256]
    assert (
        method.teacher_temps == (0.04, 0.04, 0)
        and method.criterion.student_temp == 0.1
        and method.criterion.center_momentum == 0.9
    )


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_does_not_collapse(trained, name):
    """After training the teacher's targets are neither one prototype nor all 256, and differ between images.

    Reached: entropies of 2.5, 4.1 and 4.1, where log 256 is 5.5; divergences of 1.5, 1.4 and 1.5.
    """
    run = trained(name).run
    metrics = run.method(run.batch())[1]
    assert 0.3 < metrics["teacher_entropy"] < math.log(256) - 0.7
    assert metrics["teacher_kl"] > 0.8
