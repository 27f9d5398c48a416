# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sslkernels import data
from sslkernels.methods import MAE
from sslkernels.methods.mae import unpatchify
from sslkernels.nn import VisionTransformer, sincos_positions
from sslkernels.ops import gather_patches


def mae(*, class_token: bool = True, mean=None, std=None, **options) -> MAE:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        patch_size=4, embed_dim=24, depth=1, num_heads=2, class_token=class_token, mean=mean, std=std
    )
    return MAE(backbone, **{"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, **options})


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return data.photographs(size=16, train_crops=1, test_crops=1).train_images[:5]


def patchify(images: torch.Tensor) -> torch.Tensor:
    """models_mae.py::patchify: 'nchpwq->nhwpqc'."""
    n, c, h, w = images.shape
    x = images.reshape(n, c, h // 4, 4, w // 4, 4)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(n, -1, 16 * c)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("class_token", [True, False])
def test_loss_is_the_originals(images, class_token, norm_pix_loss):
    """models_mae.py in float64 on the same mask: embed all, gather, decode all, mean over what the mask hides."""
    method = mae(class_token=class_token, norm_pix_loss=norm_pix_loss).double()
    images = images.double()
    loss, metrics = method(images, generator=torch.Generator().manual_seed(3))
    visible, masked = method.mask(images, torch.Generator().manual_seed(3))
    assert visible.shape == (5, 4) and masked.shape == (5, 12)
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1).values, torch.arange(16).expand(5, 16))

    backbone, decoder, prefix = method.backbone, method.decoder, int(class_token)
    x = backbone.patch_embed(images).flatten(2).transpose(1, 2) + backbone.positions(images)
    x = torch.stack([row[ids] for row, ids in zip(x, visible, strict=True)])
    if class_token:
        x = torch.cat([backbone.cls_token.expand(5, -1, -1), x], dim=1)
    x = decoder.embed(backbone.norm(backbone.blocks(x)))
    full = decoder.mask_token.expand(5, 16, -1).scatter(1, visible[..., None].expand(-1, -1, 16), x[:, prefix:])
    full = torch.cat([x[:, :prefix], full + sincos_positions((4, 4), 16)], dim=1)
    pred = decoder.head(decoder.norm(decoder.blocks(full)))[:, prefix:]
    target = patchify(images)
    if norm_pix_loss:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.zeros(5, 16, dtype=torch.float64).scatter(1, masked, 1.0)
    expected = ((pred - target).square().mean(dim=-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert metrics["loss"] == loss


def test_hidden_patches_are_not_looked_at(images):
    """The prediction does not change with them, the loss does."""
    method = mae()
    visible, masked = method.mask(images, torch.Generator().manual_seed(3))
    size, grid = method.backbone.patch_size, method.backbone.grid(images)
    patches = gather_patches(images, None, size, channels_last=True)
    other = unpatchify(patches.scatter(1, masked[..., None].expand(-1, -1, 48), 0.0), grid, size)
    torch.testing.assert_close(
        method.backbone.forward_features(images, visible), method.backbone.forward_features(other, visible)
    )
    losses = [method(x, generator=torch.Generator().manual_seed(3))[0] for x in (images, other)]
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_target_is_of_images_as_the_backbone_normalizes_them(images):
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.3, 0.5)
    normalized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    generator = torch.Generator()
    loss, _ = mae(mean=mean, std=std)(images, generator=generator.manual_seed(3))
    expected, _ = mae()(normalized, generator=generator.manual_seed(3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    in_bytes, _ = mae(mean=mean, std=std)((images * 255).round().to(torch.uint8), generator=generator.manual_seed(3))
    torch.testing.assert_close(loss, in_bytes, rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_decoder_reconstructs(images, norm_pix_loss, monkeypatch):
    """What the loss is zero for is the image."""
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.3, 0.5)
    method = mae(norm_pix_loss=norm_pix_loss, mean=mean, std=std)
    normalized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    target = patchify(normalized)
    if norm_pix_loss:
        target = F.layer_norm(target, (48,), eps=0) * math.sqrt(47 / 48)

    def perfect(tokens, visible, grid, wanted):
        return target.gather(1, wanted[..., None].expand(-1, -1, 48))

    monkeypatch.setattr(method.decoder, "forward", perfect)
    grey, painted = method.reconstruct(images, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(painted, images, rtol=0, atol=1e-5)
    _, masked = method.mask(images, torch.Generator().manual_seed(3))
    hidden = torch.zeros(5, 16).scatter(1, masked, 1.0).view(5, 1, 4, 4)
    hidden = F.interpolate(hidden, scale_factor=4).expand_as(images).bool()
    assert (grey[hidden] == 0.5).all() and torch.equal(grey[~hidden], images[~hidden])


def test_unpatchify_undoes_patchify(images):
    assert torch.equal(unpatchify(patchify(images), (4, 4), (4, 4)), images)
    clips = torch.rand(2, 3, 4, 8, 12)
    patches = gather_patches(clips, None, (2, 4, 4), channels_last=True)
    assert torch.equal(unpatchify(patches, (2, 2, 3), (2, 4, 4)), clips)


def test_gradient_reaches_every_parameter(images):
    method = mae()
    method(images)[0].backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for name, p in method.named_parameters() if "qkv" not in name
    )


def test_defaults_are_the_originals():
    method = MAE(VisionTransformer(patch_size=16, embed_dim=64, depth=0))
    assert method.mask_ratio == 0.75 and method.target["normalize"] is None
    assert (len(method.decoder.blocks), method.decoder.embed.out_features) == (8, 512)
    assert method.decoder.blocks[0].num_heads == 16 and method.decoder.head.out_features == 768


def test_runs_under_autocast(images):
    method = mae(norm_pix_loss=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(images, generator=torch.Generator().manual_seed(3))
        loss.backward()
    exact, _ = method(images, generator=torch.Generator().manual_seed(3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_is_one_graph(images):
    """Traced whole; what the ops compile to is their own tests' matter."""
    method = mae()
    torch.manual_seed(3)
    expected, _ = method(images)
    torch.manual_seed(3)
    traced, _ = torch.compile(method, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(traced, expected, rtol=1e-5, atol=0)
