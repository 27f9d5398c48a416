# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sslkernels import data
from sslkernels.methods import SimMIM
from sslkernels.nn import VisionTransformer


def simmim(*, class_token: bool = True, mean=None, std=None, **options) -> SimMIM:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        patch_size=4, embed_dim=24, depth=1, num_heads=2, class_token=class_token, mean=mean, std=std
    )
    return SimMIM(backbone, **{"mask_patch_size": 8, **options})


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return data.photographs(size=32, train_crops=1, test_crops=1).train_images[:5, :, :24]  # (5, 3, 24, 32)


@pytest.mark.parametrize("class_token", [True, False])
def test_loss_is_the_originals(images, class_token):
    """models/simmim.py in float64 on the same mask: embed all, mask token instead, 1x1 convolution, pixel shuffle."""
    method = simmim(class_token=class_token).double()
    images = images.double()
    loss, metrics = method(images, generator=torch.Generator().manual_seed(3))
    _, masked = method.mask(images, torch.Generator().manual_seed(3))

    backbone = method.backbone
    w = torch.zeros(5, 48, 1, dtype=torch.float64).scatter(1, masked[..., None], 1.0)
    x = backbone.patch_embed(images).flatten(2).transpose(1, 2) * (1 - w) + method.mask_token * w
    x = x + backbone.positions(images)
    if class_token:
        x = torch.cat([backbone.cls_token.expand(5, -1, -1), x], dim=1)
    z = backbone.norm(backbone.blocks(x))[:, int(class_token) :].transpose(1, 2).reshape(5, 24, 6, 8)
    painted = F.pixel_shuffle(F.conv2d(z, method.head.weight[:, :, None, None], method.head.bias), 4)
    mask = w.view(5, 6, 8).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    expected = (F.l1_loss(images, painted, reduction="none") * mask).sum() / (mask.sum() + 1e-5) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert metrics["loss"] == loss


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.6, 0.9])
def test_mask_is_whole_cells_of_the_originals_number(images, ratio):
    """12 cells of four patches each: ceil(ratio * 12) of them are masked."""
    visible, masked = simmim(mask_ratio=ratio).mask(images)
    assert masked.shape == (5, 4 * math.ceil(ratio * 12)) and visible.shape == (5, 48 - masked.shape[1])
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1).values, torch.arange(48).expand(5, 48))
    grid = torch.zeros(5, 48).scatter(1, masked, 1.0).view(5, 3, 2, 4, 2)
    assert torch.equal(grid, grid[:, :, :1, :, :1].expand_as(grid))
    if 0.2 < ratio < 0.8:
        assert len(grid.flatten(1).unique(dim=0)) > 1  # each image has its own


def test_192_pixels_have_the_papers_22_of_36_cells():
    method = SimMIM(VisionTransformer(patch_size=16, embed_dim=24, depth=0, num_heads=2))
    _, masked = method.mask(torch.zeros(2, 3, 192, 192))
    assert masked.shape == (2, 22 * 4)


def test_target_is_of_images_as_the_backbone_normalizes_them(images):
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.3, 0.5)
    normalized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    loss, _ = simmim(mean=mean, std=std)(images, generator=torch.Generator().manual_seed(3))
    expected, _ = simmim()(normalized, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_gradient_reaches_every_parameter(images):
    method = simmim()
    method(images)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_refuses():
    with pytest.raises(ValueError, match="mask_patch_size"):
        simmim(mask_patch_size=6)
    with pytest.raises(ValueError, match="mask_ratio must be between 0 and 1, got 1"):
        simmim(mask_ratio=1)
    with pytest.raises(ValueError, match=r"multiples of 8, got \(2, 3, 12, 16\)"):
        simmim()(torch.zeros(2, 3, 12, 16))
