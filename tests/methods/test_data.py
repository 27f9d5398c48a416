# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sslkernels import data


def test_digits_split():
    digits = data.digits()
    assert digits.train_images.shape == (1300, 1, 8, 8) and digits.test_images.shape == (497, 1, 8, 8)
    images = torch.cat([digits.train_images, digits.test_images])
    assert images.min() == 0 and images.max() == 1 and images.dtype == torch.float32
    assert torch.cat([digits.train_labels, digits.test_labels]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    again = data.digits()
    assert torch.equal(again.test_images, digits.test_images)


def test_photographs_hold_out_the_right_part():
    photos = data.photographs(size=16, train_crops=5, test_crops=3)
    assert photos.train_images.shape == (80, 3, 16, 16) and photos.test_images.shape == (48, 3, 16, 16)
    assert photos.train_labels.tolist() == [i for i in range(16) for _ in range(5)]
    assert photos.test_images.min() >= 0 and photos.test_images.max() <= 1
    assert torch.equal(data.photographs(size=16, train_crops=5, test_crops=3).train_images, photos.train_images)
    # A left-to-right ramp shows which columns a crop comes from.
    with pytest.MonkeyPatch.context() as patch:
        import skimage.data

        ramp = torch.arange(200).expand(120, 200).to(torch.uint8).numpy()
        patch.setattr(skimage.data, "camera", lambda: ramp)
        photos = data.photographs(size=16, train_crops=50, test_crops=50, names=("camera",))
    assert photos.train_images.max() * 255 < 120 <= photos.test_images.min() * 255 + 1e-3


def test_photographs_refuse_crops_that_do_not_fit():
    with pytest.raises(ValueError, match="crops of 400"):
        data.photographs(size=400)


def test_no_augmentation_is_the_image():
    images = data.digits().train_images[:4]
    torch.testing.assert_close(data.augment(images), images, rtol=0, atol=1e-6)


def test_augment_flips_half_and_moves_within_bounds():
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 0] = 1  # a dot at the left edge, on the middle row
    images = image.expand(400, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    flipped = data.augment(images, generator=generator, flip=True)
    left, right = flipped[:, 0, 4, 0].round().sum(), flipped[:, 0, 4, 8].round().sum()
    assert left + right == 400 and 150 < left < 250
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1
    moved = data.augment(image.expand(400, -1, -1, -1), generator=generator, shift=2 / 9)
    weight = moved[:, 0] / moved.sum(dim=(1, 2, 3), keepdim=True)[:, 0]
    column = (weight.sum(dim=1) * torch.arange(9)).sum(dim=1)
    assert (column - 4).abs().max() <= 2 + 1e-4
    assert (column - 4).abs().max() > 1.9


def test_two_views_differ_and_repeat_from_the_generator():
    images = data.digits().train_images[:6]
    first = data.two_views(images, generator=torch.Generator().manual_seed(1), **data.DIGIT_VIEWS)
    again = data.two_views(images, generator=torch.Generator().manual_seed(1), **data.DIGIT_VIEWS)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], first[1], atol=0.05)


def test_augment_refuses_bytes():
    with pytest.raises(ValueError, match="uint8"):
        data.augment(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_multi_crop_sizes_and_order():
    images = data.digits().train_images[:5]
    crops = data.multi_crop(images, generator=torch.Generator().manual_seed(1), **data.DIGIT_CROPS)
    assert [tuple(crop.shape) for crop in crops] == [(5, 1, 8, 8)] * 2 + [(5, 1, 6, 6)] * 6
    again = data.multi_crop(images, generator=torch.Generator().manual_seed(1), **data.DIGIT_CROPS)
    assert all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    assert all(not torch.allclose(crops[2], crop, atol=0.05) for crop in crops[3:])
    views = data.two_views(images, generator=torch.Generator().manual_seed(1), **data.DIGIT_VIEWS)
    assert all(torch.equal(a, b) for a, b in zip(crops[:2], views, strict=True))
    assert len(data.multi_crop(images, local_crops=0, local_size=6, local_scale=(0.5, 0.5))) == 2


def test_local_crops_are_windows_of_their_own_image():
    """On a ramp from 0 to 1 over the columns, each image at its own height, a crop spans as much as its window."""
    ramp = (torch.arange(64) + 0.5) / 64
    images = ramp.expand(3, 1, 64, 64) + torch.tensor([0.0, 10.0, 20.0]).view(3, 1, 1, 1)
    crops = data.multi_crop(images, local_crops=50, local_size=16, local_scale=(0.25, 0.5))
    for crop in crops[2:]:
        assert torch.equal((crop.mean(dim=(1, 2, 3)) / 10).floor(), torch.tensor([0.0, 1.0, 2.0]))
        span = (crop[..., -1] - crop[..., 0]).mean(dim=(1, 2)) * 16 / 15
        assert (span > 0.24).all() and (span < 0.51).all()


def test_multi_crop_refuses_sizes():
    with pytest.raises(ValueError, match="local_crops=-1"):
        data.multi_crop(torch.zeros(1, 1, 8, 8), local_crops=-1, local_size=4, local_scale=(0.5, 0.5))
    with pytest.raises(ValueError, match="local_size=0"):
        data.multi_crop(torch.zeros(1, 1, 8, 8), local_size=0, local_scale=(0.5, 0.5))


def test_captions_name_their_digit():
    labels = torch.arange(10).repeat(8)
    captions = data.digit_captions(labels, generator=torch.Generator().manual_seed(0))
    words = [[data.CAPTION_VOCABULARY[i] for i in row if i] for row in captions.tolist()]
    assert all(data.DIGIT_NAMES[label] in row for label, row in zip(labels.tolist(), words, strict=True))
    assert len({" ".join(row) for row in words}) > 20
    assert ["a", "photo", "of", "the", "number", "three"] in words
