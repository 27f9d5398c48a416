# SPDX-License-Identifier: Apache-2.0
"""Skip-gram with negative sampling, and the random numbers of its training, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._random import seed_tensor
from sslkernels.reference import _philox
from sslkernels.reference._precision import compute_dtype

FIRST_NEGATIVE = 4  # of a position's random words: 0 keeps the word or drops it, 1 is its window


def scores(
    input_weight: Tensor, output_weight: Tensor, inputs: Tensor, outputs: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """<u, v> and <u, n_k> (B, 1+K), which of them count, and the rows (B, 1+K) of output_weight.

    An id outside its table, which cannot raise on every device, makes the scores of its pair NaN.
    """
    dtype = compute_dtype(input_weight, output_weight)
    rows = torch.cat((outputs[:, None], negatives), 1)
    u = input_weight[inputs.clamp(0, len(input_weight) - 1)].to(dtype)
    v = output_weight[rows.clamp(0, len(output_weight) - 1)].to(dtype)
    bad = (inputs < 0) | (inputs >= len(input_weight)) | ((rows < 0) | (rows >= len(output_weight))).any(1)
    s = (v @ u[..., None]).squeeze(-1).masked_fill(bad[:, None], torch.nan)
    return s, counted(outputs, negatives), rows


def counted(outputs: Tensor, negatives: Tensor) -> Tensor:
    """(B, 1+K) bool: the positive, and the negatives that are not it."""
    return torch.cat((torch.ones_like(outputs, dtype=torch.bool)[:, None], negatives != outputs[:, None]), 1)


def skipgram(
    input_weight: Tensor,
    output_weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    negatives: Tensor,
    reduction: str = "sum",
) -> Tensor:
    s, counts, _ = scores(input_weight, output_weight, inputs, outputs, negatives)
    terms = F.softplus(torch.cat((-s[:, :1], s[:, 1:]), 1), threshold=80.0)
    loss = torch.where(counts, terms, 0.0).sum(1)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


# as the dispatcher calls them: gradients written out, because autograd does not record below it


def forward(
    input_weight: Tensor,
    output_weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    negatives: Tensor,
    reduction: str,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and the slope (B, 1+K) of the reduced loss along each score."""
    s, counts, _ = scores(input_weight, output_weight, inputs, outputs, negatives)
    loss = skipgram(input_weight, output_weight, inputs, outputs, negatives, reduction)
    slopes = torch.where(counts, torch.cat((-torch.sigmoid(-s[:, :1]), torch.sigmoid(s[:, 1:])), 1), 0.0)
    return loss, slopes / max(len(inputs), 1) if reduction == "mean" else slopes


def backward_rows(
    grad: Tensor,
    slopes: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    negatives: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """What each pair adds to its rows: (B, D) to input_weight's, (B (1+K), D) to output_weight's; empty if not asked
    for."""
    rows = torch.cat((outputs[:, None], negatives), 1).clamp(0, len(output_weight) - 1)
    u = input_weight[inputs.clamp(0, len(input_weight) - 1)].to(slopes.dtype)
    weights = (slopes * grad.to(slopes.dtype).reshape(-1, 1))[..., None]  # (B, 1+K, 1)
    counts = counted(outputs, negatives)[..., None]
    dinput, doutput = input_weight.new_empty(0), output_weight.new_empty(0)
    if mask[0]:
        v = output_weight[rows].to(slopes.dtype)
        dinput = torch.where(counts, weights * v, 0.0).sum(1).to(input_weight.dtype)
    if mask[1]:
        doutput = torch.where(counts, weights * u[:, None], 0.0).flatten(0, 1).to(output_weight.dtype)
    return dinput, doutput


def backward(
    grad: Tensor,
    slopes: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    negatives: Tensor,
    mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables, dense; empty if not asked for."""
    wide = input_weight.to(slopes.dtype), output_weight.to(slopes.dtype)
    values = backward_rows(grad, slopes, *wide, inputs, outputs, negatives, mask)
    rows = torch.cat((outputs[:, None], negatives), 1).flatten()
    grads = []
    for weight, index, value, wanted in zip((input_weight, output_weight), (inputs, rows), values, mask, strict=True):
        total = torch.zeros(weight.shape if wanted else 0, dtype=slopes.dtype, device=weight.device)
        if wanted:
            total.index_add_(0, index.clamp(0, len(weight) - 1), value)
        grads.append(total.to(weight.dtype))
    return grads[0], grads[1]


class AliasTable(NamedTuple):
    """Draws word v with a fixed probability in constant time: a column at random, then it or its alias."""

    threshold: Tensor  # (V,) int64: column v is v below it, of 2^32, else alias[v]
    alias: Tensor  # (V,) int64

    def draw(self, word: Tensor) -> Tensor:
        """The words that uniform random 32-bit numbers (int64) choose."""
        product = word * len(self.alias)
        column = product >> 32
        return torch.where((product & 0xFFFFFFFF) < self.threshold[column], column, self.alias[column])

    def sample(self, *shape: int, generator: torch.Generator | None = None, seed: int | Tensor | None = None) -> Tensor:
        """Words drawn independently, int64 of this shape: the same for a seed on every device."""
        seed = seed_tensor(seed, generator, self.alias.device)
        index = torch.arange(math.prod(shape), device=self.alias.device)
        return self.draw(_philox.words(seed, torch.zeros_like(index), index)).reshape(shape)


def alias_table(weights: Tensor) -> AliasTable:
    """Vose's algorithm: light columns are filled up by heavy ones, one each."""
    exact = weights.detach().double().cpu()
    share = (exact / exact.sum() * len(exact)).tolist()
    heaviest = max(range(len(share)), key=share.__getitem__)
    alias = [heaviest] * len(share)
    light: list[int] = []
    heavy: list[int] = []
    for v, x in enumerate(share):
        (light if x < 1 else heavy).append(v)
    while light and heavy:
        v, w = light.pop(), heavy.pop()
        alias[v] = w
        share[w] -= 1 - share[v]
        (light if share[w] < 1 else heavy).append(w)
    threshold = [min(round(x * 2**32), 2**32) for x in share]  # rounding may leave a column light: its alias stays
    return AliasTable(*(torch.tensor(x, dtype=torch.int64, device=weights.device) for x in (threshold, alias)))


class Pairs(NamedTuple):
    """What one call of `skipgram_update_` trains on, in order."""

    inputs: Tensor  # (P,) the context words
    outputs: Tensor  # (P,) the centre words
    negatives: Tensor  # (P, K)


def training_pairs(
    tokens: Tensor, offsets: Tensor, table: AliasTable, keep: Tensor | None, seed: Tensor, window: int, negatives: int
) -> Pairs:
    """The pairs of a text: words dropped first, then windows, then the draws, all by Philox(seed, position, word)."""
    tokens = tokens.long()
    position = torch.arange(len(tokens), device=tokens.device)
    sentence = torch.searchsorted(offsets, position, right=True)
    if keep is not None:
        kept = _philox.uniform(_philox.words(seed, position, torch.zeros_like(position))) < keep[tokens]
        tokens, position, sentence = tokens[kept], position[kept], sentence[kept]
    width = window - _philox.below(_philox.words(seed, position, torch.ones_like(position)), window)  # (N,)
    offset = torch.cat((torch.arange(-window, 0), torch.arange(1, window + 1))).to(position.device)
    context = torch.arange(len(tokens), device=tokens.device)[:, None] + offset  # (N, 2 window)
    inside = (context >= 0) & (context < len(tokens)) & (offset.abs() <= width[:, None])
    context = context.clamp(0, max(len(tokens) - 1, 0))
    inside &= sentence[context] == sentence[:, None] if len(tokens) else inside
    centre, _ = inside.nonzero(as_tuple=True)
    number = (inside.cumsum(1) - 1)[inside]  # of the pair within its centre
    index = FIRST_NEGATIVE + number[:, None] * negatives + torch.arange(negatives, device=tokens.device)
    draws = table.draw(_philox.words(seed, position[centre][:, None], index))
    return Pairs(tokens[context[inside]], tokens[centre], draws)


def skipgram_update_(
    input_weight: Tensor,
    output_weight: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    threshold: Tensor,
    alias: Tensor,
    keep: Tensor | None,
    seed: Tensor,
    lr: float,
    window: int,
    negatives: int,
    hogwild: bool,
) -> None:
    """One step a pair, pair after pair; each draw sees what the draws before it have changed."""
    pairs = training_pairs(tokens, offsets, AliasTable(threshold, alias), keep, seed, window, negatives)
    for context, centre, draws in zip(*(x.tolist() for x in pairs), strict=True):
        u = input_weight[context]
        step = torch.zeros_like(u)
        for k, row in enumerate([centre, *draws]):
            if k and row == centre:
                continue
            v = output_weight[row]
            g = ((1.0 if k == 0 else 0.0) - torch.sigmoid(v @ u)) * lr
            step += g * v
            v += g * u
        u += step
