# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslkernels import data
from sslkernels.methods import BEiT
from sslkernels.nn import PatchTokenizer, VisionTransformer
from sslkernels.training import dataset

CODES = 12


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return data.photographs(size=32, train_crops=1, test_crops=1).train_images[:5, :, :24]  # (5, 3, 24, 32)


def beit(images, *, class_token: bool = True, tokenizer=None) -> BEiT:
    torch.manual_seed(0)
    backbone = VisionTransformer(patch_size=4, embed_dim=24, depth=1, num_heads=2, class_token=class_token)
    tokenizer = tokenizer or PatchTokenizer.fit(images, CODES, patch_size=4)
    method = BEiT(backbone, tokenizer, num_codes=CODES, mask_options={"min_patches": 4})
    torch.nn.init.normal_(method.head.bias)  # zero at first, when a lost bias would not show
    return method


@pytest.mark.parametrize("class_token", [True, False])
def test_loss_is_the_originals(images, class_token):
    """modeling_pretrain.py in float64 on the same mask: lm_head at masked tokens, cross-entropy with their codes."""
    images = images.double()
    method = beit(images, class_token=class_token).double()
    loss, metrics = method(images, generator=torch.Generator().manual_seed(3))
    mask = method.mask(images, torch.Generator().manual_seed(3)).flatten(1)

    backbone = method.backbone
    w = mask[..., None].double()
    x = backbone.patch_embed(images).flatten(2).transpose(1, 2) * (1 - w) + method.mask_token * w
    x = x + backbone.positions(images)
    if class_token:
        x = torch.cat([backbone.cls_token.expand(5, -1, -1), x], dim=1)
    x = backbone.norm(backbone.blocks(x))[:, int(class_token) :][mask]
    logits = x @ method.head.weight.T + method.head.bias
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(5, 48, 48)
    codes = torch.cdist(patches, method.tokenizer.centroids[None]).argmin(-1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, codes[mask]), rtol=1e-12, atol=0)
    assert metrics["loss"] == loss


def test_mask_is_the_originals():
    """224 pixels in patches of 16: 75 of 196 at the most, in blocks of 16 and more, so that some have a few less."""
    method = BEiT(VisionTransformer(patch_size=16, embed_dim=24, depth=0, num_heads=2), lambda x: x)
    counts = method.mask(torch.zeros(200, 3, 224, 224)).flatten(1).sum(dim=1)
    assert counts.max() == 75 and counts.min() > 60 and 74 < counts.float().mean() < 75
    assert method.head.out_features == 8192


def test_hidden_patches_are_not_seen(images):
    """With codes of another view, what a hidden patch shows changes nothing; what a visible one shows does."""
    codes = torch.randint(CODES, (5, 48), generator=torch.Generator().manual_seed(0))
    method = beit(images, tokenizer=lambda x: codes)
    mask = method.mask(images, torch.Generator().manual_seed(3))
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(4))
    losses = [
        method(x, generator=torch.Generator().manual_seed(3))[0]
        for x in (images, torch.where(pixels, noise, images), torch.where(pixels, images, noise))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_tokenizer(images):
    tokenizer = PatchTokenizer.fit(images, CODES, patch_size=(4, 8))
    assert tokenizer.num_codes == CODES and tokenizer.centroids.shape == (CODES, 96)
    codes = tokenizer(images)
    assert codes.shape == (5, 24) and codes.dtype == torch.int64 and len(codes.unique()) == CODES
    assert torch.equal(PatchTokenizer.fit(images, CODES, patch_size=(4, 8)).centroids, tokenizer.centroids)
    # patches that are centroids are their own codes, in row-major order
    wanted = torch.randperm(CODES)[:6].view(1, 2, 3)
    image = tokenizer.centroids[wanted].view(1, 2, 3, 4, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 8, 24)
    assert torch.equal(tokenizer(image), wanted.flatten(1))
    other = PatchTokenizer(torch.zeros_like(tokenizer.centroids), (4, 8))
    other.load_state_dict(tokenizer.state_dict())
    assert torch.equal(other(images), codes)


def test_tokenizer_gets_no_gradient(images):
    scale = torch.ones((), requires_grad=True)
    codes = beit(images).tokenizer(images)
    method = beit(images, tokenizer=lambda x: (codes * scale).long())
    method(images)[0].backward()
    assert scale.grad is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_refuses_codes_of_another_grid(images):
    with pytest.raises(ValueError, match=r"tokenizer must give codes \(5, 48\), got \(5, 12\)"):
        beit(images, tokenizer=lambda x: torch.zeros(5, 12, dtype=torch.int64))(images)


def test_names_held_out_codes(trained):
    """Better than by the most frequent code of the training crops."""
    method = trained("beit").run.method
    photographs = dataset("photographs")
    codes = method.tokenizer(photographs.test_images)
    common = method.tokenizer(photographs.train_images).flatten().bincount().argmax()
    mask = method.mask(photographs.test_images, torch.Generator().manual_seed(0)).flatten(1)
    tokens = method.backbone.embed(photographs.test_images)
    tokens = torch.where(mask[..., None], method.mask_token, tokens) + method.backbone.positions(
        photographs.test_images
    )
    with torch.no_grad():
        named = method.head(method.backbone.forward_tokens(tokens)[mask]).argmax(dim=1)
    right = (named == codes[mask]).float().mean()
    assert right > 1.5 * (codes[mask] == common).float().mean() > 0
