# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sslkernels import data
from sslkernels.methods import VideoMAE
from sslkernels.nn import VisionTransformer, sincos_positions


def videomae(*, class_token: bool = False, **options) -> VideoMAE:
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=(2, 4, 4), embed_dim=24, depth=1, num_heads=2, class_token=class_token)
    return VideoMAE(backbone, **{"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, **options})


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return data.clips(size=16, frames=4, train_clips=3, test_clips=1).train_clips


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_originals(clips, norm_pix_loss):
    """modeling_pretrain.py and engine_for_pretraining.py in float64: visible first, then mask tokens, head on the last;
    targets 'b (t h w) (p0 p1 p2) c', each channel with its own mean and deviation, eps beside the root."""
    method = videomae(norm_pix_loss=norm_pix_loss).double()
    clips = clips.double()
    loss, _ = method(clips, generator=torch.Generator().manual_seed(3))
    visible, masked = method.mask(clips, torch.Generator().manual_seed(3))

    def rows(x, ids):
        return torch.stack([row[i] for row, i in zip(x, ids, strict=True)])

    backbone, decoder = method.backbone, method.decoder
    x = backbone.patch_embed(clips).flatten(2).transpose(1, 2) + backbone.positions(clips)
    x = decoder.embed(backbone.norm(backbone.blocks(rows(x, visible))))
    positions = sincos_positions((2, 4, 4), 16).double().expand(3, -1, -1)
    full = torch.cat([x + rows(positions, visible), decoder.mask_token + rows(positions, masked)], dim=1)
    pred = decoder.head(decoder.norm(decoder.blocks(full)[:, -masked.shape[1] :]))

    t = clips.reshape(3, 3, 2, 2, 4, 4, 4, 4)  # b c t p0 h p1 w p2
    t = t.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(3, 32, 32, 3)
    if norm_pix_loss:
        t = (t - t.mean(dim=-2, keepdim=True)) / (t.var(dim=-2, keepdim=True).sqrt() + 1e-6)
    expected = (pred - rows(t.flatten(2), masked)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_mask_is_tubes(clips):
    """int(0.9 * 16) = 14 places, the same ones in both frames of tokens, others for another clip."""
    visible, masked = videomae().mask(clips)
    assert visible.shape == (3, 4) and masked.shape == (3, 28)
    assert torch.equal(visible[:, :2] + 16, visible[:, 2:]) and torch.equal(masked[:, :14] + 16, masked[:, 14:])
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1).values, torch.arange(32).expand(3, 32))
    assert len(visible.unique(dim=0)) > 1


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_decoder_reconstructs(clips, norm_pix_loss, monkeypatch):
    method = videomae(norm_pix_loss=norm_pix_loss)
    t = clips.reshape(3, 3, 2, 2, 4, 4, 4, 4).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(3, 32, 32, 3)
    if norm_pix_loss:
        t = (t - t.mean(dim=-2, keepdim=True)) / (t.std(dim=-2, keepdim=True) + 1e-6)
    t = t.flatten(2)

    def perfect(tokens, visible, grid, wanted):
        return t.gather(1, wanted[..., None].expand(-1, -1, 96))

    monkeypatch.setattr(method.decoder, "forward", perfect)
    grey, painted = method.reconstruct(clips)
    torch.testing.assert_close(painted, clips, rtol=0, atol=1e-5)
    assert ((grey == 0.5).float().mean() - 28 / 32).abs() < 0.01


def test_takes_bytes_and_a_class_token(clips):
    method = videomae(class_token=True)
    loss, _ = method(clips, generator=torch.Generator().manual_seed(3))
    in_bytes, _ = method((clips * 255).round().to(torch.uint8), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(in_bytes, loss, rtol=1e-4, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_defaults_are_the_originals():
    method = VideoMAE(VisionTransformer(patch_size=(2, 16, 16), embed_dim=24, depth=0, num_heads=2))
    assert method.mask_ratio == 0.9 and method.target == {"normalize": "channel", "mean": None, "std": None}
    assert method.decoder.embed.bias is None and method.decoder.head.out_features == 1536
    assert (len(method.decoder.blocks), method.decoder.blocks[0].num_heads) == (4, 6)


def test_refuses_a_backbone_of_images():
    with pytest.raises(ValueError, match="must take clips"):
        VideoMAE(VisionTransformer(patch_size=4))
