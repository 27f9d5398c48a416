# SPDX-License-Identifier: Apache-2.0
"""What must hold of each kind of mask: counts, shapes, statistics. A function returns what is wrong, or None.

A mask is True where a token is hidden. The expected means are those of the originals, for which a restatement of each
is tested here as well; a mean over a batch may be off by six standard errors, which chance does once in 1e9.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Ids = tuple[Tensor, Tensor]


def first(*problems: str | None) -> str | None:
    return next(filter(None, problems), None)


def mean_near(what: str, values: Tensor, expected: float, deviation: float) -> str | None:
    """`deviation`: of one value."""
    mean, error = values.double().mean().item(), 6 * deviation / math.sqrt(values.numel())
    return None if abs(mean - expected) <= error else f"{what}: mean {mean:.4g}, expected {expected:.4g} +- {error:.2g}"


def complementary(ids: Ids, batch: int, visible: int, masked: int) -> str | None:
    """Fixed counts that make up every token once."""
    shapes = [tuple(x.shape) for x in ids]
    if shapes != [(batch, visible), (batch, masked)]:
        return f"ids are {shapes}, expected {[(batch, visible), (batch, masked)]}"
    together = torch.cat([x.long() for x in ids], 1).sort(1).values
    if not torch.equal(together, torch.arange(visible + masked).expand(batch, -1)):
        return "visible and masked do not make up the tokens"
    # Uniform numbers of [0, L), drawn without replacement: the mean of a sample's visible ones.
    length = visible + masked
    deviation = math.sqrt((length**2 - 1) / 12 / visible * masked / (length - 1))
    return mean_near("visible id", ids[0].double().mean(1), (length - 1) / 2, deviation)


def random(result: Ids, B: int, L: int, **options: float) -> str | None:
    return complementary(result, B, L // 4, L - L // 4)


def tube(result: Ids, B: int, frames: int, grid: int, ratio: float) -> str | None:
    places = grid**2
    masked = int(ratio * places)
    if result[1].shape != (B, frames * masked):
        return f"masked is {tuple(result[1].shape)}, expected {(B, frames * masked)}"
    of_frame = result[1].sort(1).values.view(B, frames, masked) - places * torch.arange(frames)[:, None]
    if not (of_frame == of_frame[:, :1]).all():
        return "frames are not masked alike"
    visible = result[0].sort(1).values[:, : places - masked]
    return complementary((visible, of_frame[:, 0]), B, places - masked, masked)


def inverse_block(result: Ids, B: int, grid: int, ratio: float, **options: float) -> str | None:
    visible = int(grid**2 * (1 - ratio))
    shapes = [tuple(x.shape) for x in result]
    if shapes != [(B, visible), (B, grid**2 - visible)]:
        return f"ids are {shapes}, expected {[(B, visible), (B, grid**2 - visible)]}"
    kept = torch.zeros(B, grid**2).scatter_(1, result[0], 1.0)
    if not (kept.sum(1) == visible).all() or (kept.gather(1, result[1]) != 0).any():
        return "visible and masked do not make up the tokens"
    # Kept in blocks: most visible tokens have a visible neighbour, where every fifth would have by chance.
    kept = kept.view(B, grid, grid)
    beside = (kept[:, :, 1:] * kept[:, :, :-1]).sum((1, 2)) / visible
    return None if beside.mean() > 0.4 else f"{beside.mean():.2f} visible right neighbours a token, expected blocks"


def dinov2(result: Tensor, B: int, grid: int, ratio: tuple[float, float], probability: float) -> str | None:
    """Half of the samples, from as many equal slices of the range of ratios; blocks may stop short of a target."""
    if result.dtype != torch.bool or result.shape[0] != B or result[0].numel() != grid**2:
        return f"got {result.dtype} {tuple(result.shape)}, expected bool masks of {B} grids of {grid}"
    counts = result.view(B, -1).sum(1)
    some = counts[counts > 0]
    low, high = ratio
    if len(some) != int(B * probability):
        return f"{len(some)} samples are masked, expected {int(B * probability)}"
    if some.max() > high * grid**2:
        return f"{int(some.max())} tokens are masked, expected at most {high * grid**2}"
    mask = result.view(B, grid, grid)
    beside = ((mask[:, :, 1:] & mask[:, :, :-1]).sum() / some.sum()).item()
    if beside < 0.5:
        return f"{beside:.2f} masked right neighbours a masked token, expected blocks"
    share = some.double().mean().item() / grid**2
    # It falls short of a target by a few tokens, and of a large one by more.
    middle, error = (low + high) / 2, 6 * (high - low) / len(some) / math.sqrt(12 * len(some))
    enough = 0.85 * middle - error <= share <= middle + error
    return None if enough else f"{share:.3f} of the tokens are masked, not {middle} +- {error:.3f}"


def rectangles(ids: Tensor, grid: int) -> bool:
    """Whether each row of ids is a full rectangle of the grid, in order."""
    y, x = ids // grid, ids % grid
    height = y.amax(-1) - y.amin(-1) + 1
    width = x.amax(-1) - x.amin(-1) + 1
    return bool((height * width == ids.shape[-1]).all() and (ids.diff(dim=-1) > 0).all())


def multiblock(result: Ids, B: int, grid: int) -> str | None:
    """I-JEPA: four target rectangles of one size; a context block without them, cut to the batch's minimum."""
    context, targets = result
    if context.shape[0] != B or targets.shape[:2] != (B, 4):
        return f"got {tuple(context.shape)} and {tuple(targets.shape)}, expected ({B}, K) and ({B}, 4, K)"
    length = grid**2
    size, left = targets.shape[-1] / length, context.shape[1] / length
    if not 0.12 <= size <= 0.23:  # 0.15 to 0.2, and the rounding of its sides
        return f"a target has {size:.2f} of the grid, expected 0.15 to 0.2"
    if not rectangles(targets, grid):
        return "a target is no rectangle"
    hidden = torch.zeros(B, length, dtype=torch.bool).scatter_(1, targets.flatten(1), True)
    if hidden.gather(1, context).any():
        return "context and targets overlap"
    if not (context.diff(dim=1) > 0).all() or context.max() >= length:
        return "the context is not in order"
    return None if 10 / length < left < 0.7 else f"the context has {left:.2f} of the grid"


def runs(mask: Tensor, shortest: int) -> bool:
    """Whether every run of masked frames is at least so long."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    return bool((ends - starts >= shortest).all())


def span(result: Tensor, B: int, T: int, ratio: float, span: int) -> str | None:
    """wav2vec 2.0: ratio * T / span starts without replacement, a span each, overlaps allowed."""
    if result.dtype != torch.bool or result.shape != (B, T):
        return f"got {result.dtype} {tuple(result.shape)}, expected torch.bool {(B, T)}"
    if not runs(result, span):
        return f"a run of masked frames is shorter than {span}"
    # A frame in the middle is left out if none of its `span` possible starts is taken; the count rounds at random.
    starts, places = ratio * T / span, T - span + 1
    open_ = [math.prod(1 - starts / places for _ in range(min(t + 1, T - t, span))) for t in range(T)]
    # The rounding is drawn once for the batch by some, so that a batch may be one start off.
    share = result.double().mean().item()
    expected, slack = 1 - sum(open_) / T, span / T + 0.6 / math.sqrt(B * T / span)
    return None if abs(share - expected) <= slack else f"{share:.3f} of the frames are masked, not {expected:.3f}"


def token(result: Ids, tokens: Tensor, mask_token: int, vocabulary: int, ratio: float, special: Tensor) -> str | None:
    """BERT: labels where chosen and -100 elsewhere; of the chosen 80% hidden, 10% random, 10% left."""
    inputs, labels = result
    chosen = labels != -100
    if (chosen & special).any() or not torch.equal(labels[chosen], tokens[chosen]):
        return "a special token is chosen, or a label is not the token"
    if not torch.equal(inputs[~chosen], tokens[~chosen]):
        return "a token that was not chosen is changed"
    hidden, left = inputs[chosen] == mask_token, inputs[chosen] == tokens[chosen]
    return first(
        mean_near("chosen", chosen[~special], ratio, math.sqrt(ratio)),
        mean_near("hidden", hidden, 0.8, 0.4),
        mean_near("left", left, 0.1 + 0.1 / vocabulary, 0.3),
        None if inputs.min() >= 0 and inputs.max() < vocabulary else "a token is outside the vocabulary",
    )


def corruption(result: Ids, tokens: Tensor, vocabulary: int, ratio: float, mean_span: float, eos: int) -> str | None:
    """T5: sentinels count down from the last token of the vocabulary, and what each stands for is in the other."""
    inputs, targets = (x.long() for x in result)
    B, length = tokens.shape
    noise = round(length * ratio)
    spans = max(round(noise / mean_span), 1)
    expected = [(B, length - noise + spans + 1), (B, noise + spans + 1)]
    if [tuple(inputs.shape), tuple(targets.shape)] != expected:
        return f"got {tuple(inputs.shape)} and {tuple(targets.shape)}, expected {expected}"
    for source, target, whole in zip(inputs.tolist(), targets.tolist(), tokens.tolist(), strict=True):
        if source[-1] != eos or target[-1] != eos:
            return "a row does not end"
        meant: dict[int, list[int]] = {}
        for x in target[:-1]:
            if x >= vocabulary - spans:
                meant[x] = []
            elif meant:
                meant[next(reversed(meant))].append(x)
        if list(meant) != [vocabulary - 1 - i for i in range(spans)]:
            return "the sentinels do not count down"
        again = [t for x in source[:-1] for t in meant.get(x, [x])]
        if again != whole:
            return "inputs and targets do not make up the tokens"
    return None
