# SPDX-License-Identifier: Apache-2.0
"""What the originals do, said again with numpy's generator: one sample at a time, with their loops."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Random = np.random.Generator


def stacked(masks: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(masks)).flatten(1)


def block(
    random: Random, height: int, width: int, target: float, smallest: float, most: float, attempts: int = 10
) -> np.ndarray:
    """BEiT, iBOT and DINOv2: True where masked."""
    mask, count = np.zeros((height, width), bool), 0
    while count < target:
        budget, delta = min(target - count, most), 0
        for _ in range(attempts):
            area = smallest + (budget - smallest) * random.random()  # the budget may be the lower end
            aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = random.integers(height - h + 1), random.integers(width - w + 1)
            inside = mask[top : top + h, left : left + w]
            delta = int(h * w - inside.sum())
            if 0 < delta <= budget:
                inside[:] = True
                break
            delta = 0
        if delta == 0:
            break
        count += delta
    return mask


def ijepa(
    random: Random, batch: int, height: int, width: int, *, fixed: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Contexts before they are cut, and unions of the targets; `fixed`: with independent draws and every position."""

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        u, v = random.random(2)
        area = int(height * width * (scale[0] + u * (scale[1] - scale[0])))
        a = aspect[0] + (v if fixed else u) * (aspect[1] - aspect[0])
        return min(round(math.sqrt(area * a)), height - 1), min(round(math.sqrt(area / a)), width - 1)

    def place(h: int, w: int) -> np.ndarray:
        mask = np.zeros((height, width), bool)
        top, left = random.integers(height - h + fixed), random.integers(width - w + fixed)
        mask[top : top + h, left : left + w] = True
        return mask

    target, context = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    contexts, unions = [], []
    for _ in range(batch):
        blocks = [place(*target) for _ in range(4)]
        allowed, failures = blocks, 0
        while (member := place(*context) & ~np.any([*allowed, np.zeros_like(blocks[0])], axis=0)).sum() <= 10:
            failures += 1
            if failures % 20 == 0:
                allowed = allowed[:-1]
        contexts.append(member)
        unions.append(np.any(blocks, axis=0))
    return contexts, unions


def vjepa(random: Random, batch: int, grid: tuple[int, int, int], blocks: int, scale: float) -> list[np.ndarray]:
    """Targets before they are cut."""
    _, height, width = grid
    area, aspect = int(height * width * scale), 0.75 + random.random() * 0.75
    h, w = min(round(math.sqrt(area * aspect)), height), min(round(math.sqrt(area / aspect)), width)
    out = []
    while len(out) < batch:
        mask = np.zeros(grid, bool)
        for _ in range(blocks):
            top, left = random.integers(height - h + 1), random.integers(width - w + 1)
            mask[:, top : top + h, left : left + w] = True
        if not mask.all():
            out.append(mask)
    return out


def _adjusted(random: Random, mask: np.ndarray, count: int) -> np.ndarray:
    flat = mask.reshape(-1)
    surplus = int(flat.sum()) - count
    places = random.choice(np.flatnonzero(flat if surplus > 0 else ~flat), abs(surplus), replace=False)
    flat[places] = surplus <= 0
    return mask


def data2vec_image(random: Random, side: int = 14) -> np.ndarray:
    """True where visible."""
    mask = np.zeros((side, side), bool)
    for centre in random.integers(side * side, size=int(side * side * (0.2 + 0.07) / 9)):
        i, j = np.clip([[x - 1, x, x + 1] for x in divmod(int(centre), side)], 0, side - 1)
        mask[np.ix_(i, j)] = True
    return _adjusted(random, mask, int(side * side * 0.2))


def data2vec_audio(random: Random, length: int) -> np.ndarray:
    mask = np.zeros(length, bool)
    for centre in random.integers(length, size=int(length * (0.5 + 0.05) / 5)):
        mask[np.clip(np.arange(centre - 2, centre + 3), 0, length - 1)] = True
    return _adjusted(random, mask, int(length * 0.5))


def wav2vec2(random: Random, length: int, ratio: float, span: int) -> np.ndarray:
    mask = np.zeros(length, bool)
    count = int(ratio * length / span + random.random())
    for start in random.choice(length - span + 1, count, replace=False):
        mask[start : start + span] = True
    return mask


def spanbert(random: Random, starts: np.ndarray, ratio: float = 0.15, p: float = 0.2, longest: int = 10) -> np.ndarray:
    """`starts`: True where a word begins."""
    length, chances = len(starts), p * (1 - p) ** np.arange(longest)
    budget, mask = math.ceil(length * ratio), np.zeros(len(starts), bool)
    word = np.cumsum(starts)
    while mask.sum() < budget:
        words = random.choice(longest, p=chances / chances.sum()) + 1
        anchor = random.integers(length)
        if mask[anchor]:
            continue
        for i in np.flatnonzero((word >= word[anchor]) & (word < word[anchor] + words)):
            if mask.sum() < budget:
                mask[i] = True
    return mask


def bert(random: Random, candidates: list[list[int]], length: int, counted: int) -> np.ndarray:
    """Candidates are words of several pieces, or single pieces."""
    mask, count = np.zeros(length, bool), max(1, round(counted * 0.15))
    for word in random.permutation(len(candidates)):
        if mask.sum() + len(candidates[word]) <= count:
            mask[candidates[word]] = True
    return mask


def t5(random: Random, length: int, noise: int, spans: int) -> np.ndarray:
    """True where noise."""

    def segments(items: int) -> np.ndarray:
        begins = np.arange(items - 1) < spans - 1
        random.shuffle(begins)
        return np.bincount(np.cumsum(np.concatenate(([False], begins))), minlength=spans)

    runs = np.stack((segments(length - noise), segments(noise)), axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, runs)
