# SPDX-License-Identifier: Apache-2.0
"""The masks of patch grids in plain PyTorch: loops over attempts, whole batches at once, and the definition.

Every word comes from Philox, so that a kernel gives the same masks, bit for bit, and sample b has words of its own:

    word(b, region, i) = word 2^34 region + i of stream 2^48 tag + b        with a tag for each function

A random subset of k out of n is the k smallest of one word each, the earlier of two equal ones first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkernels.reference import _philox as philox

RANDOM, BLOCK, INVERSE, MULTIBLOCK, MULTIBLOCK3D, SPAN, TOKEN, CORRUPTION = range(1, 9)  # tags
BATCH = 1 << 47  # the stream of what all samples of a batch share, in place of a sample number
CONTEXT_ATTEMPTS = 20  # before one target block is allowed to overlap
CLIP_ATTEMPTS = 100  # to find blocks that leave a context


def words(seed: Tensor, tag: int, batch: int, region: int, index: Tensor) -> Tensor:
    """word(b, region, index) of each sample, (B, n); index is (n,) or (B, n)."""
    samples = torch.arange(batch, device=seed.device)[:, None]
    return philox.words(seed, (tag << 48) + samples, (region << 34) + index)


def batch_words(seed: Tensor, tag: int, count: int) -> Tensor:
    """The first words that the whole batch shares, (count,)."""
    index = torch.arange(count, device=seed.device)
    return philox.words(seed, torch.full_like(index, (tag << 48) + BATCH), index)


def fraction(word: Tensor) -> Tensor:
    """Uniform in [0, 1), float64, a multiple of 2^-32."""
    return word.to(torch.float64) * 2.0**-32


def first(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the `count` smallest keys of each row, and of the others, both ascending."""
    order = keys.argsort(dim=1, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def random_mask(seed: Tensor, batch: int, frames: int, places: int, keep: int) -> tuple[Tensor, Tensor]:
    """`keep` random places of `places`, the same in each frame, and the others: ids (B, frames * count)."""
    index = torch.arange(places, device=seed.device)
    step = places * torch.arange(frames, device=seed.device)[:, None]
    visible, masked = ((ids[:, None] + step).flatten(1) for ids in first(words(seed, RANDOM, batch, 0, index), keep))
    return visible, masked


def rectangle(top: Tensor, left: Tensor, h: Tensor | int, w: Tensor | int, height: int, width: int) -> Tensor:
    """True inside the block: (..., height, width) of positions (...)."""
    rows = torch.arange(height, device=top.device) - top[..., None]
    cols = torch.arange(width, device=top.device) - left[..., None]
    h, w = (x[..., None] if isinstance(x, Tensor) else x for x in (h, w))
    return ((rows >= 0) & (rows < h))[..., :, None] & ((cols >= 0) & (cols < w))[..., None, :]


def _block_targets(
    seed: Tensor, batch: int, size: int, low: float, high: float, probability: float, slices: bool, whole: bool
) -> Tensor:
    """How many patches each sample masks, (B,) float64."""
    draw = fraction(words(seed, BLOCK, batch, 0, torch.arange(2, device=seed.device)))
    if slices:  # the masked samples take equal slices of [low, high], in random order
        count = int(batch * probability)
        rank = batch_words(seed, BLOCK, batch).argsort(stable=True).argsort()
        chosen, u = rank < count, (rank + draw[:, 0]) / max(count, 1)
    else:
        chosen, u = draw[:, 1] < probability, draw[:, 0]
    target = size * (low + (high - low) * u)
    return torch.where(chosen, (target + 1e-9).floor() if whole else target, 0.0)


def block_draws(size: int, max_area: float, attempts: int) -> int:
    """Most draws for a sample, far above what any needs: a loop without a look at the mask must have an end."""
    return attempts * (20 + 2 * int(size / max_area))


def block_mask(
    seed: Tensor,
    batch: int,
    height: int,
    width: int,
    low: float,
    high: float,
    min_area: float,
    max_area: float,
    log_aspect_low: float,
    log_aspect_high: float,
    attempts: int,
    probability: float,
    slices: bool,
    whole: bool,
) -> Tensor:
    """Blocks of random area and aspect until the target is reached or `attempts` draws in a row failed: (B, H, W)."""
    target = _block_targets(seed, batch, height * width, low, high, probability, slices, whole)
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=seed.device)
    count, fails = (torch.zeros(batch, dtype=torch.int64, device=seed.device) for _ in range(2))
    for t in range(block_draws(height * width, max_area, attempts)):
        live = (count < target) & (fails < attempts)
        if seed.device.type == "cpu" and not live.any():
            break
        word = words(seed, BLOCK, batch, 1, 4 * t + torch.arange(4, device=seed.device))
        budget = (target - count).clamp(max=max_area)
        area = min_area + (budget - min_area) * fraction(word[:, 0])
        aspect = (log_aspect_low + (log_aspect_high - log_aspect_low) * fraction(word[:, 1])).exp()
        # the budget of a sample that is done may be negative, which nobody takes
        h, w = ((x.clamp(min=0).sqrt().round()).to(torch.int64) for x in (area * aspect, area / aspect))
        top = philox.below(word[:, 2], (height - h + 1).clamp(min=1))
        left = philox.below(word[:, 3], (width - w + 1).clamp(min=1))
        new = rectangle(top, left, h, w, height, width) & ~mask
        added = new.sum((1, 2))
        taken = live & (h < height) & (w < width) & (added > 0) & (added <= budget)
        mask |= new & taken[:, None, None]
        count += added * taken
        fails = torch.where(taken, 0, fails + 1)
    return mask


def inverse_block_mask(
    seed: Tensor, batch: int, height: int, width: int, blocks: int, block_size: int, keep: int
) -> tuple[Tensor, Tensor]:
    """Blocks around random centres stay visible, then random patches are dropped or added until `keep` are."""
    size = height * width
    centre = philox.below(words(seed, INVERSE, batch, 1, torch.arange(blocks, device=seed.device)), size)
    top, left = centre // width - block_size // 2, centre % width - block_size // 2  # cut at the border
    kept = rectangle(top, left, block_size, block_size, height, width).any(1).flatten(1)
    key = words(seed, INVERSE, batch, 0, torch.arange(size, device=seed.device))
    return first(key + (~kept).to(torch.int64) * 2**32, keep)


def block_size(area: int, aspect: float, height: int, width: int) -> tuple[int, int]:
    """Sides of a block, within the grid and never empty."""
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return max(min(h, height), 1), max(min(w, width), 1)


def inner_block_size(scale: float, aspect: float, height: int, width: int) -> tuple[int, int]:
    """I-JEPA's: smaller than the grid in each direction."""
    return block_size(int(height * width * scale), aspect, height - 1, width - 1)


def _mix(ends: list[float], u: float) -> float:
    return ends[0] + u * (ends[1] - ends[0])


def _survivors(seed: Tensor, tag: int, member: Tensor, count: int, region: int, raster: bool) -> Tensor:
    """`count` members of each row (B, L): random ones, or the first; ascending."""
    key = torch.zeros(member.shape, dtype=torch.int64, device=seed.device)
    if not raster:
        key = words(seed, tag, len(member), region, torch.arange(member.shape[1], device=seed.device))
    return first(key + (~member).to(torch.int64) * 2**32, count)[0]


def multiblock_mask(
    seed: Tensor,
    batch: int,
    height: int,
    width: int,
    targets: int,
    context_scale: list[float],
    target_scale: list[float],
    target_aspect: list[float],
    min_keep: int,
    allow_overlap: bool,
    raster: bool,
    reproduce_bugs: bool,
    context_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """One block size a batch; target blocks anywhere, a context block less the targets, cut to a common length."""
    size = height * width
    u = [float(x) for x in fraction(batch_words(seed, MULTIBLOCK, 3))]
    aspect = _mix(target_aspect, u[0] if reproduce_bugs else u[1])
    sizes = [
        inner_block_size(_mix(target_scale, u[0]), aspect, height, width),
        inner_block_size(_mix(context_scale, u[2]), 1.0, height, width),
    ]
    # how many positions there are; the last row and column are never inside with reproduce_bugs
    rows, cols = ([max(n - s + (not reproduce_bugs), 1) for s in side] for n, side in zip((height, width), zip(*sizes)))
    index = torch.arange(targets, device=seed.device)
    top = philox.below(words(seed, MULTIBLOCK, batch, 1, 2 * index), rows[0])
    left = philox.below(words(seed, MULTIBLOCK, batch, 1, 2 * index + 1), cols[0])
    blocks = rectangle(top, left, *sizes[0], height, width).flatten(2)  # (B, targets, L)
    target = first((~blocks.flatten(0, 1)).to(torch.int64), sizes[0][0] * sizes[0][1])[0].unflatten(0, (batch, targets))

    context = torch.zeros(batch, size, dtype=torch.bool, device=seed.device)
    todo = torch.ones(batch, dtype=torch.bool, device=seed.device)
    levels = 0 if allow_overlap else targets
    for attempt in range(CONTEXT_ATTEMPTS * (levels + 1)):
        if not todo.any():
            break
        avoided = levels - attempt // CONTEXT_ATTEMPTS  # the last block is given up first
        word = words(seed, MULTIBLOCK, batch, 2, 2 * attempt + torch.arange(2, device=seed.device))
        place = philox.below(word[:, 0], rows[1]), philox.below(word[:, 1], cols[1])
        member = rectangle(*place, *sizes[1], height, width).flatten(1) & ~blocks[:, :avoided].any(1)
        context = torch.where(todo[:, None], member, context)
        todo = todo & (member.sum(1) <= min_keep)
    shortest = int(context.sum(1).amin()) if batch else 0
    if context_tokens is not None and batch and shortest < context_tokens:
        raise ValueError(f"context_tokens must be at most the {shortest} of this batch, got {context_tokens}")
    count = shortest if context_tokens is None else context_tokens
    return _survivors(seed, MULTIBLOCK, context, count, 0, raster), target


def multiblock3d_mask(
    seed: Tensor,
    batch: int,
    frames: int,
    height: int,
    width: int,
    blocks: int,
    spatial_scale: list[float],
    temporal_scale: list[float],
    aspect: list[float],
    raster: bool,
    context_frames: int,
    max_keep: int | None,
) -> tuple[Tensor, Tensor]:
    """Union of `blocks` blocks of one size is the target, the rest of the first frames the context."""
    u = [float(x) for x in fraction(batch_words(seed, MULTIBLOCK3D, 3))]
    t = max(1, int(frames * _mix(temporal_scale, u[0])))
    h, w = block_size(int(height * width * _mix(spatial_scale, u[1])), _mix(aspect, u[2]), height, width)
    context = torch.zeros(batch, frames, height, width, dtype=torch.bool, device=seed.device)
    todo = torch.ones(batch, dtype=torch.bool, device=seed.device)
    time = torch.arange(frames, device=seed.device)
    for attempt in range(CLIP_ATTEMPTS):
        if not todo.any():
            break
        index = 4 * (attempt * blocks + torch.arange(blocks, device=seed.device))
        top, left, start = (
            philox.below(words(seed, MULTIBLOCK3D, batch, 2, index + i), n)
            for i, n in enumerate((height - h + 1, width - w + 1, frames - t + 1))
        )
        during = (time >= start[..., None]) & (time < start[..., None] + t)  # (B, blocks, T)
        inside = during[..., None, None] & rectangle(top, left, h, w, height, width)[:, :, None]
        member = ~inside.any(1) & (time < context_frames)[:, None, None]
        context = torch.where(todo[:, None, None, None], member, context)
        todo = todo & ~member.flatten(1).any(1)
    if todo.any():
        raise ValueError(f"blocks must leave a context, got {blocks} of {t} x {h} x {w} that cover the clip")
    context = context.flatten(1)
    visible = context.sum(1)
    kept, lost = (int(visible.amin()), int((context.shape[1] - visible).amin())) if batch else (0, 0)
    kept = kept if max_keep is None else min(kept, max_keep)
    return (
        _survivors(seed, MULTIBLOCK3D, context, kept, 0, raster),
        _survivors(seed, MULTIBLOCK3D, ~context, lost, 1, raster),
    )
