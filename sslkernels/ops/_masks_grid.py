# SPDX-License-Identifier: Apache-2.0
"""Masks of patch grids with counts known beforehand: random, tube, block and inverse block.

A word of Philox decides everything, addressed by (seed, sample, counter): the masks are the same on every device and
at every number of threads, and a sample's mask does not depend on the others (but for the slices of `block_mask`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels import _library
from sslkernels._random import seed_tensor
from sslkernels.ops._registry import define
from sslkernels.reference import masks as reference

Device = torch.device | str | None
MOST_PATCHES = 2**30  # of a grid


def grid_of(grid: Any, count: int = 2, smallest: int = 1) -> tuple[int, ...]:
    grid = check.integers("grid", grid, count, smallest)
    check.integer("grid's number of patches", math.prod(grid), 1, MOST_PATCHES)
    return grid


def on_host(seed: int | Tensor | None, generator: torch.Generator | None) -> bool:
    """Whether the seed is known without asking a device."""
    return not isinstance(seed, Tensor) and (generator is None or generator.device.type == "cpu")


def moved(x: Tensor, device: Device) -> Tensor:
    """x on `device`, without waiting for what the device is doing.

    A CUDA graph would replay the copy and not the draw, out of memory that is given back: refused.
    """
    target = torch.device("cpu" if device is None else device)
    if target.type == "cpu":
        return x
    pinned = target.type == "cuda" and not torch.compiler.is_compiling()
    if pinned and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a mask that is drawn on the host cannot be captured in a CUDA graph: draw it before")
    return (x.pin_memory() if pinned else x).to(target, non_blocking=True)


def _ids_fake(seed: Tensor, batch: int, frames: int, places: int, keep: int) -> tuple[Tensor, Tensor]:
    return seed.new_empty(batch, frames * keep), seed.new_empty(batch, frames * (places - keep))


_random = define(
    "random_mask(Tensor seed, SymInt batch, SymInt frames, SymInt places, SymInt keep)"
    " -> (Tensor visible, Tensor masked)",
    reference=reference.random_mask,
    fake=_ids_fake,
)
_block = define(
    "block_mask(Tensor seed, SymInt batch, SymInt height, SymInt width, float low, float high, float min_area,"
    " float max_area, float log_aspect_low, float log_aspect_high, int attempts, float probability, bool slices,"
    " bool whole) -> Tensor",
    reference=reference.block_mask,
    fake=lambda seed, batch, height, width, *rest: seed.new_empty(batch, height, width, dtype=torch.bool),
)
_inverse = define(
    "inverse_block_mask(Tensor seed, SymInt batch, SymInt height, SymInt width, SymInt blocks, int block_size,"
    " SymInt keep) -> (Tensor visible, Tensor masked)",
    reference=reference.inverse_block_mask,
    fake=lambda seed, batch, height, width, blocks, block_size, keep: _ids_fake(seed, batch, 1, height * width, keep),
)


def _kept(keep: int, length: int, ratio: float) -> int:
    if keep < 1 or keep >= length:
        raise ValueError(f"ratio must leave something visible and something masked of {length}, got {ratio}")
    return keep


def random_mask(
    batch_size: int,
    length: int,
    ratio: float = 0.75,
    *,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide a uniformly random part of the tokens: MAE's mask.

    Each sample keeps K = int(length * (1 - ratio)) tokens; every set of K is equally likely.

    Args:
        batch_size: B. May be 0.
        length: L, tokens of a sample.
        ratio: of the tokens, hidden; in (0, 1).
        device: of the result; the CPU if not given.
        generator, seed: where the randomness comes from (one of them at most; torch's default generator otherwise).
            `seed` is an integer or an int64 tensor of one element, and the same seed gives the same mask everywhere.

    Returns:
        visible, (B, K), and masked, (B, L - K): int64 ids, each ascending.

    Raises:
        ValueError, TypeError: a ratio outside (0, 1) or one that leaves nothing on either side; sizes that are not
            positive; seed and generator together.

    Example:
        >>> visible, masked = random_mask(8, 196, 0.75)
        >>> visible.shape, masked.shape
        (torch.Size([8, 49]), torch.Size([8, 147]))

    Source: facebookresearch/mae, models_mae.py::random_masking.
    """
    check.integer("batch_size", batch_size, 0)
    check.integer("length", length, 2, MOST_PATCHES)
    check.ratio("ratio", ratio)
    keep = _kept(int(length * (1 - ratio)), length, ratio)
    return _random(seed_tensor(seed, generator, device), batch_size, 1, length, keep)


def tube_mask(
    batch_size: int,
    frames: int,
    grid: Sequence[int],
    ratio: float = 0.9,
    *,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide the same random places in every frame: VideoMAE's mask.

    Args:
        frames: T, after tubelets.
        grid: (h, w), patches of a frame; int(ratio * h * w) of them are hidden, in all frames.
        batch_size, device, generator, seed: as in `random_mask`.

    Returns:
        visible, (B, T * K), and masked, (B, T * (h * w - K)): int64 ids in the order (t, h, w), each ascending.

    Raises:
        ValueError, TypeError: as in `random_mask`; a grid that is not two positive integers.

    Example:
        >>> visible, masked = tube_mask(2, 8, (14, 14), 0.9)
        >>> visible.shape, masked.shape
        (torch.Size([2, 160]), torch.Size([2, 1408]))

    Source: MCG-NJU/VideoMAE, masking_generator.py::TubeMaskingGenerator.
    """
    check.integer("batch_size", batch_size, 0)
    check.integer("frames", frames, 1)
    height, width = grid_of(grid)
    check.ratio("ratio", ratio)
    keep = _kept(height * width - int(ratio * height * width), height * width, ratio)
    return _random(seed_tensor(seed, generator, device), batch_size, frames, height * width, keep)


def inverse_block_mask(
    batch_size: int,
    grid: Sequence[int],
    ratio: float = 0.8,
    block_size: int = 3,
    adjust: float = 0.07,
    *,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep blocks and hide the rest, with exact counts: data2vec 2.0's mask of images.

    int(L (1 - ratio + adjust) / block_size^2) blocks with random centres (repeats allowed, cut at the border) stay
    visible. Then random patches are dropped or added until exactly K = int(L (1 - ratio)) are, L = h * w.

    Args:
        adjust: how much more the blocks cover than is kept, to make up for what they share.
        batch_size, grid, device, generator, seed: as in `tube_mask`.

    Returns:
        visible, (B, K), and masked, (B, L - K): int64 ids, each ascending.

    Raises:
        ValueError, TypeError: as in `tube_mask`; a block larger than the grid.

    Example:
        >>> visible, masked = inverse_block_mask(4, (14, 14))
        >>> visible.shape, masked.shape
        (torch.Size([4, 39]), torch.Size([4, 157]))

    Source: facebookresearch/fairseq, examples/data2vec; fairseq/data/data_utils.py::compute_block_mask_2d.
    """
    check.integer("batch_size", batch_size, 0)
    height, width = grid_of(grid)
    check.ratio("ratio", ratio)
    check.integer("block_size", block_size, 1, min(height, width))
    check.in_range("adjust", adjust, 0.0, 1.0)
    size = height * width
    keep = _kept(int(size * (1 - ratio)), size, ratio)
    blocks = int(size * ((1 - ratio + adjust) / block_size**2))
    return _inverse(seed_tensor(seed, generator, device), batch_size, height, width, blocks, block_size, keep)


def block_mask(
    batch_size: int,
    grid: Sequence[int],
    ratio: float | Sequence[float] = 0.4,
    *,
    min_patches: int | None = None,
    max_patches: int | None = None,
    aspect: Sequence[float] = (0.3, 1 / 0.3),
    attempts: int = 10,
    style: str = "dinov2",
    probability: float = 1.0,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Hide random blocks until a target is reached: the masks of BEiT, iBOT and DINOv2.

        repeat until count >= target or `attempts` draws in a row failed:
            area ~ U(min_patches, min(target - count, max_patches)), aspect ~ log-uniform
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            hide the block if h < H, w < W and it adds between 1 and target - count (at most max_patches) patches

    A sample may end below its target, never above. The styles differ in what is not given, and in the target:

        style     min_patches          max_patches  which samples                    target
        "dinov2"  4                    H W // 2     exactly int(B * probability)     int(H W r), r from the sample's own
                                                                                     slice of [low, high], shuffled
        "beit"    16                   none         each with this probability       int(H W r), r ~ U(low, high)
        "ibot"    (min(H, W) // 3)^2   none         each with this probability       H W r, r ~ U(low, high)

    DINOv2 is ratio=(0.1, 0.5), probability=0.5; BEiT is ratio=75/196, style="beit"; iBOT is ratio=(0.1, 0.5),
    probability=0.5, style="ibot".

    Args:
        grid: (H, W), patches.
        ratio: r itself, or (low, high).
        aspect: the smallest and the largest h / w.
        attempts: draws for one block before the sample is left as it is.
        batch_size, device, generator, seed: as in `random_mask`. On a device without a compiled kernel the mask is
            drawn on the host, if that knows the seed, and sent over.

    Returns:
        (B, H, W) bool, True where hidden.

    Raises:
        ValueError, TypeError: a ratio outside (0, 1); a grid smaller than 2 x 2; other numbers out of range, by name.

    Example:
        >>> block_mask(64, (16, 16), (0.1, 0.5), probability=0.5).shape
        torch.Size([64, 16, 16])

    Source: microsoft/unilm beit/masking_generator.py, bytedance/ibot loader.py::ImageFolderMask,
        facebookresearch/dinov2 dinov2/data/{masking,collate}.py.
    """
    check.integer("batch_size", batch_size, 0)
    height, width = grid_of(grid, 2, 2)
    if isinstance(ratio, Sequence):
        low, high = check.interval("ratio", ratio, -1.0, 1.0)
        check.in_range("ratio[0]", low, 0.0, 1.0)
        check.ratio("ratio[1]", high)
    else:
        check.ratio("ratio", ratio)
        low = high = float(ratio)
    check.choice("style", style, ("dinov2", "ibot", "beit"))
    size = height * width
    smallest = {"dinov2": 4, "beit": 16, "ibot": max((min(height, width) // 3) ** 2, 1)}[style]
    min_patches = smallest if min_patches is None else min_patches
    max_patches = (max(size // 2, 1) if style == "dinov2" else size) if max_patches is None else max_patches
    check.integer("min_patches", min_patches, 1, size)
    check.integer("max_patches", max_patches, 1)
    narrow, wide = check.interval("aspect", aspect, 0.0, math.inf)
    check.integer("attempts", attempts, 1)
    check.in_range("probability", probability, 0.0, math.nextafter(1.0, 2.0))
    target = torch.device("cpu" if device is None else device).type
    # where only the reference serves, the host is faster, if it knows the seed
    host = on_host(seed, generator) and "block_mask" not in _library.COMPILED.get(target, ())
    mask = _block(
        *(seed_tensor(seed, generator, None if host else device), batch_size, height, width, low, high),
        *(float(min_patches), float(max_patches), math.log(narrow), math.log(wide), attempts, float(probability)),
        *(style == "dinov2", style != "ibot"),
    )
    return moved(mask, device) if host else mask
