# SPDX-License-Identifier: Apache-2.0
"""Contenders for masks of a grid: the originals' generators for a batch, in their loops, drawing as they draw.

A restatement given the same seeds returns the same masks as the original (tried against the files named below).
Only one has a "lean": the loops are what the originals are.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Contender
from benchmarks.contenders.contrastive import LEAN, OURS

Ids = tuple[Tensor, Tensor]

# --- Uniform -----------------------------------------------------------------------------------------------------


def mae_random(B: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sorts: the second finds the way back, and the mask in order. A quarter stays visible."""
    keep = int(L * (1 - 0.75))
    shuffle = torch.argsort(torch.rand(B, L), dim=1)
    restore = torch.argsort(shuffle, dim=1)
    mask = torch.ones(B, L)
    mask[:, :keep] = 0
    mask = torch.gather(mask, dim=1, index=restore)
    return shuffle[:, :keep], shuffle[:, keep:], mask


def lightly_random(B: int, L: int) -> Ids:
    """One sort; no mask in order, no way back."""
    indices = torch.argsort(torch.rand(B, L), dim=1)
    keep = int(L * (1 - 0.75))
    return indices[:, :keep], indices[:, keep:]


def lean_random(B: int, L: int) -> Ids:
    """One sort as well, of each part's ids then, as ours are."""
    keep = int(L * (1 - 0.75))
    shuffle = torch.rand(B, L).argsort(1)
    return shuffle[:, :keep].sort(1).values, shuffle[:, keep:].sort(1).values


def ours_random(B: int, L: int) -> Ids:
    from sslkernels.ops import random_mask

    return random_mask(B, L, 0.75)


def videomae_tube(B: int, frames: int, grid: int, ratio: float) -> Tensor:
    places = grid**2
    masked = int(ratio * places)
    masks = []
    for _ in range(B):
        frame = np.hstack([np.zeros(places - masked), np.ones(masked)])
        np.random.shuffle(frame)  # noqa: NPY002
        masks.append(np.tile(frame, (frames, 1)).flatten())
    return torch.from_numpy(np.stack(masks)).to(torch.bool)


def ids_of(mask: Tensor) -> Ids:
    return tuple(part.nonzero()[:, 1].view(len(mask), -1) for part in (~mask, mask))


def ours_tube(B: int, frames: int, grid: int, ratio: float) -> Ids:
    from sslkernels.ops import tube_mask

    return tube_mask(B, frames, (grid, grid), ratio)


# --- Blocks ------------------------------------------------------------------------------------------------------


def dinov2_blocks(grid: int, target: int, largest: float) -> np.ndarray:
    """One mask: blocks until the target is reached or ten attempts in a row fail; at least 4 tokens, aspect >= 0.3."""
    mask = np.zeros((grid, grid), dtype=bool)
    aspects = math.log(0.3), math.log(1 / 0.3)
    count = 0
    while count < target:
        limit = min(target - count, largest)
        added = 0
        for _ in range(10):
            area = random.uniform(4, limit)
            aspect = math.exp(random.uniform(*aspects))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < grid and h < grid:
                top, left = random.randint(0, grid - h), random.randint(0, grid - w)
                overlap = mask[top : top + h, left : left + w].sum()
                if 0 < h * w - overlap <= limit:
                    for i in range(top, top + h):
                        for j in range(left, left + w):
                            if mask[i, j] == 0:
                                mask[i, j] = 1
                                added += 1
                if added > 0:
                    break
        if added == 0:
            break
        count += added
    return mask


def dinov2(B: int, grid: int, ratio: tuple[float, float], probability: float) -> Tensor:
    """The part of its collate function that makes masks."""
    some = int(B * probability)
    slices = torch.linspace(*ratio, some + 1)
    masks = []
    for i in range(some):
        target = int(grid**2 * random.uniform(slices[i], slices[i + 1]))
        masks.append(torch.BoolTensor(dinov2_blocks(grid, target, 0.5 * grid**2)))
    masks += [torch.BoolTensor(dinov2_blocks(grid, 0, 0.5 * grid**2)) for _ in range(some, B)]
    random.shuffle(masks)
    return torch.stack(masks).flatten(1)


def ours_block(B: int, grid: int, ratio: tuple[float, float], probability: float) -> Tensor:
    from sslkernels.ops import block_mask

    return block_mask(
        B, (grid, grid), ratio, min_patches=4, max_patches=int(0.5 * grid**2), style="dinov2", probability=probability
    )


def ijepa_size(g: torch.Generator, grid: int, scale: tuple[float, float], aspect: tuple[float, float]) -> list[int]:
    """One random number for scale and aspect."""
    r = torch.rand(1, generator=g).item()
    area = int(grid**2 * (scale[0] + r * (scale[1] - scale[0])))
    a = aspect[0] + r * (aspect[1] - aspect[0])
    return [min(round(math.sqrt(x)), grid - 1) for x in (area * a, area / a)]


def ijepa_block(grid: int, size: list[int], keep: int, regions: list[Tensor] | None = None) -> Ids:
    """Ids of a block inside `regions` (one fewer after each 20 failures), and the mask of what is outside of it."""
    h, w = size
    failures = 0
    while True:
        top, left = torch.randint(0, grid - h, (1,)), torch.randint(0, grid - w, (1,))
        mask = torch.zeros((grid, grid), dtype=torch.int32)
        mask[top : top + h, left : left + w] = 1
        for region in (regions or [])[: max(len(regions or []) - failures // 20, 0)]:
            mask *= region
        ids = torch.nonzero(mask.flatten())
        if len(ids) > keep:
            break
        failures += 1
    outside = torch.ones((grid, grid), dtype=torch.int32)
    outside[top : top + h, left : left + w] = 0
    return ids.squeeze(), outside


def ijepa(B: int, grid: int) -> tuple[list[Tensor], list[Tensor]]:
    """The part of its collator that makes masks, with the published configuration."""
    ijepa.step += 1
    g = torch.Generator()
    g.manual_seed(ijepa.step)
    target_size = ijepa_size(g, grid, (0.15, 0.2), (0.75, 1.5))
    context_size = ijepa_size(g, grid, (0.85, 1.0), (1.0, 1.0))
    contexts, targets = [], []
    least_context = least_target = grid**2
    for _ in range(B):
        blocks = [ijepa_block(grid, target_size, 10) for _ in range(4)]
        least_target = min(least_target, *(len(ids) for ids, _ in blocks))
        targets.append([ids for ids, _ in blocks])
        context, _ = ijepa_block(grid, context_size, 10, [outside for _, outside in blocks])
        least_context = min(least_context, len(context))
        contexts.append([context])
    collate = torch.utils.data.default_collate
    targets = collate([[ids[:least_target] for ids in row] for row in targets])
    return collate([[ids[:least_context] for ids in row] for row in contexts]), targets


ijepa.step = -1  # of the collator


def stacked(result: tuple[list[Tensor], list[Tensor]]) -> Ids:
    contexts, targets = result
    return contexts[0], torch.stack(targets, 1)


def ours_multiblock(B: int, grid: int) -> Ids:
    from sslkernels.ops import multiblock_mask

    return multiblock_mask(B, (grid, grid))


def data2vec(B: int, grid: int, ratio: float, block: int, adjust: float) -> Tensor:
    """Kept blocks around random centres, then single tokens more or fewer, sample by sample, to the exact count."""
    L, share = grid**2, 1 - ratio
    mask = torch.zeros(B, grid, grid)
    centres = torch.randint(0, L, size=(B, int(L * ((share + adjust) / block**2))))
    mask.view(B, -1).scatter_(1, centres, 1)
    centres = mask.nonzero(as_tuple=True)
    inds: tuple[list[Tensor], ...] = ([], [], [])
    offset = block // 2
    for i in range(block):
        for j in range(block):
            inds[0].append(centres[0])
            inds[1].append(centres[1] + i - offset)
            inds[2].append(centres[2] + j - offset)
    y, x = (torch.cat(part).clamp_(min=0, max=grid - 1) for part in inds[1:])
    mask[(torch.cat(inds[0]), y, x)] = 1
    mask = mask.reshape(B, -1)
    counts, wanted = mask.sum(dim=-1), int(L * share)
    for i in range(B):
        n, m = counts[i], mask[i]
        if n > wanted:
            m[torch.multinomial(m, int(n - wanted), replacement=False)] = 0
        elif n < wanted:
            m[torch.multinomial(1 - m, int(wanted - n), replacement=False)] = 1
    return 1 - mask


def ours_inverse(B: int, grid: int, ratio: float, block: int, adjust: float) -> Ids:
    from sslkernels.ops import inverse_block_mask

    return inverse_block_mask(B, (grid, grid), ratio, block, adjust)


RANDOM = (
    Contender("sslkernels", ours_random, OURS),
    Contender(
        "mae", mae_random, "facebookresearch/mae, models_mae.py, random_masking without its gather of the tokens",
        result=lambda result: result[:2],
    ),
    Contender("lightly", lightly_random, "lightly 1.6, models/utils.py, random_token_mask with mask_class_token"),
    Contender("lean", lean_random, LEAN),
)  # fmt: skip
TUBE = (
    Contender("sslkernels", ours_tube, OURS),
    Contender("videomae", videomae_tube, "MCG-NJU/VideoMAE, masking_generator.py", result=ids_of),
)
BLOCK = (
    Contender("sslkernels", ours_block, OURS),
    Contender("dinov2", dinov2, "facebookresearch/dinov2, data/masking.py and the masks of data/collate.py"),
)
MULTIBLOCK = (
    Contender("sslkernels", ours_multiblock, OURS),
    Contender("ijepa", ijepa, "facebookresearch/ijepa, masks/multiblock.py", result=stacked),
)
INVERSE = (
    Contender("sslkernels", ours_inverse, OURS),
    Contender(
        "data2vec", data2vec, "facebookresearch/fairseq, data/data_utils.py, compute_block_mask_2d",
        result=lambda mask: ids_of(mask.bool()),
    ),
)  # fmt: skip
