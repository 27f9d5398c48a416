# SPDX-License-Identifier: Apache-2.0
"""Small real data that installed packages ship (nothing is downloaded), and views and crops of images, on tensors.

The clips have a file of their own, `sslkernels/video.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.video import ClipData, clips

__all__ = [
    "CAPTION_TEMPLATES",
    "CAPTION_VOCABULARY",
    "DIGIT_CROPS",
    "DIGIT_VIEWS",
    "PHOTOGRAPHS",
    "PHOTO_CROPS",
    "PHOTO_VIEWS",
    "ClipData",
    "ImageData",
    "augment",
    "caption_tokens",
    "clips",
    "digit_captions",
    "digits",
    "multi_crop",
    "photographs",
    "two_views",
]

# scikit-image's own photographs that its wheel holds; the rest of `skimage.data` is downloaded, drawn or text.
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock", "coffee", "coins",
    "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle",
)  # fmt: skip

# Options of `augment`. A mirrored digit is another sign, so digits are not flipped.
DIGIT_VIEWS = {"scale": (0.8, 1.2), "shift": 0.1, "rotate": 10.0, "brightness": 0.2, "contrast": 0.3, "noise": 0.1}
PHOTO_VIEWS = {"scale": (0.4, 1.0), "flip": True, "brightness": 0.3, "contrast": 0.4, "noise": 0.03}

# Options of `multi_crop`. Local windows are large for a digit, a third of which may be of any.
DIGIT_CROPS = {**DIGIT_VIEWS, "local_size": 6, "local_scale": (0.6, 0.9)}
PHOTO_CROPS = {**PHOTO_VIEWS, "scale": (0.5, 1.0), "local_size": 16, "local_scale": (0.25, 0.5)}

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_TEMPLATES = (
    "a photo of the number {}",
    "the digit {} written by hand",
    "a small scan of a {}",
    "somebody wrote {} here",
)
# Index 0 pads captions to one length.
CAPTION_VOCABULARY = ("", *sorted({w for t in CAPTION_TEMPLATES for w in t.format("").split()}), *DIGIT_NAMES)


class ImageData(NamedTuple):
    """Images (N, C, H, W), float32 in [0, 1], and their class indices (N,), int64, of two disjoint parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def digits(*, test_size: int = 497) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey: `test_size` held out after a fixed shuffle.

    Source: the test part of "Optical Recognition of Handwritten Digits" (UCI), shipped inside scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # (1797, 1, 8, 8), 16 is white
    labels = torch.from_numpy(bunch.target).long()
    if not 0 < test_size < len(images):
        raise ValueError(f"test_size must be between 1 and {len(images) - 1}, got {test_size}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:test_size], order[test_size:]
    return ImageData(images[train], labels[train], images[test], labels[test], DIGIT_NAMES)


def photographs(
    *, size: int = 32, train_crops: int = 96, test_crops: int = 32, names: tuple[str, ...] = PHOTOGRAPHS
) -> ImageData:
    """Random crops (3, size, size) of scikit-image's photographs; the class of a crop is its photograph.

    Training crops come from the left 60% of a photograph, held-out crops from the right 40%: they share no pixel.
    Crops are squares of `size` to 3 `size` pixels, scaled down with antialiasing; the same ones at every call.
    """
    import skimage.data

    if size < 1 or train_crops < 1 or test_crops < 1:
        raise ValueError(f"expected positive sizes, got {size=}, {train_crops=}, {test_crops=}")
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for name in names:
        array = getattr(skimage.data, name)()
        array = array[0] if isinstance(array, tuple) else array  # a stereo pair comes with its disparity
        image = torch.tensor(array).float() / 255
        image = image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, -1, -1)  # (3, H, W)
        cut = int(0.6 * image.shape[-1])
        train.append(_random_crops(image[..., :cut], size, train_crops, generator))
        test.append(_random_crops(image[..., cut:], size, test_crops, generator))
    labels = torch.arange(len(names))
    return ImageData(
        torch.cat(train), labels.repeat_interleave(train_crops), torch.cat(test), labels.repeat_interleave(test_crops),
        names,
    )  # fmt: skip


def _random_crops(image: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` square crops (count, 3, size, size) of an image (3, H, W)."""
    largest = min(3 * size, *image.shape[-2:])
    if largest < size:
        raise ValueError(f"crops of {size} do not fit into a photograph's part of {tuple(image.shape[-2:])}")
    crops = []
    for _ in range(count):
        side, y, x = torch.rand(3, generator=generator).tolist()
        side = size + int(side * (largest - size + 1))
        top, left = int(y * (image.shape[-2] - side + 1)), int(x * (image.shape[-1] - side + 1))
        crop = image[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(crops)


def caption_tokens(captions: Sequence[str]) -> Tensor:
    """Token ids (N, L) into `CAPTION_VOCABULARY` of texts in its words: int64, padded with 0.

    Example:
        >>> caption_tokens(["the digit two", "a two"]).ne(0).sum(1)
        tensor([3, 2])
    """
    index = {word: i for i, word in enumerate(CAPTION_VOCABULARY)}
    rows = [torch.tensor([index[word] for word in caption.split()]) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def digit_captions(labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """A caption for each digit label (N,), as token ids (N, L) into `CAPTION_VOCABULARY`: int64, padded with 0.

    A toy of image-text data, and no more: ten classes under four templates, so captions in a batch repeat and the
    contrastive losses cannot reach zero. It shows that the two towers meet.
    """
    table = caption_tokens([t.format(name) for t in CAPTION_TEMPLATES for name in DIGIT_NAMES])
    template = torch.randint(len(CAPTION_TEMPLATES), labels.shape, generator=generator)
    return table[template * len(DIGIT_NAMES) + labels.cpu()].to(labels.device)


def augment(
    images: Tensor,
    *,
    generator: torch.Generator | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: float = 0.0,
    rotate: float = 0.0,
    flip: bool = False,
    brightness: float = 0.0,
    contrast: float = 0.0,
    noise: float = 0.0,
    size: int | None = None,
) -> Tensor:
    """One random view of each image (N, C, H, W), drawn from `generator` on the images' device.

    A square window of `scale` times the side is cut out, anywhere inside the image where it is smaller, moved by up
    to `shift` of the side, turned by up to `rotate` degrees, mirrored half of the time if `flip`, and resized to
    `size` x `size`, or back to what it was, with zeros beyond the border. Then each image is multiplied by
    1 +- `contrast` about its mean, 1 +- `brightness` in all, and Gaussian noise of standard deviation `noise` is added.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    n, device, dtype = len(images), images.device, images.dtype

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator, device=device, dtype=dtype) * (high - low) + low

    side = uniform(*scale)
    angle = uniform(-rotate, rotate) * (math.pi / 180)
    slack = (1 - side).clamp(min=0) + 2 * shift  # grid_sample's coordinates span the image from -1 to 1
    mirror = uniform(-1, 1).sign() if flip else torch.ones_like(side)
    cos, sin = side * angle.cos(), side * angle.sin()
    theta = torch.stack([cos * mirror, -sin, uniform(-1, 1) * slack, sin * mirror, cos, uniform(-1, 1) * slack], dim=1)
    shape = [*images.shape[:2], *(images.shape[2:] if size is None else (size, size))]
    grid = F.affine_grid(theta.view(n, 2, 3), shape, align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    mean = views.mean(dim=(1, 2, 3), keepdim=True)
    views = mean + (views - mean) * uniform(1 - contrast, 1 + contrast).view(n, 1, 1, 1)
    views = views * uniform(1 - brightness, 1 + brightness).view(n, 1, 1, 1)
    return views + noise * torch.randn(views.shape, generator=generator, device=device, dtype=dtype)


def two_views(images: Tensor, *, generator: torch.Generator | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Two independent `augment`ed views of each image, as SimCLR and MoCo take them: (view0, view1)."""
    return augment(images, generator=generator, **options), augment(images, generator=generator, **options)


def multi_crop(
    images: Tensor,
    *,
    local_crops: int = 6,
    local_size: int,
    local_scale: tuple[float, float],
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[Tensor]:
    """Two global crops of each image (N, C, H, W), then `local_crops` local ones of `local_size` pixels a side.

    All are independent `augment`ed views: global ones with `options`, whose `scale` is the side of their windows, and
    of the images' size; local ones with the same options but `local_scale`. SwAV, DINO, iBOT and DINOv2 take such a
    list; the papers' sizes are 224 and 96 pixels, 6 or 8 local crops.
    """
    if local_crops < 0 or local_size < 1:
        raise ValueError(
            f"expected local_crops of at least 0 and local_size of at least 1, got {local_crops=}, {local_size=}"
        )
    crops = list(two_views(images, generator=generator, **options))
    if local_crops:
        repeated = images.repeat(local_crops, 1, 1, 1)
        options = {**options, "scale": local_scale, "size": local_size}
        crops += augment(repeated, generator=generator, **options).chunk(local_crops)
    return crops
