# SPDX-License-Identifier: Apache-2.0
"""Published formulas of the token losses, written out; run in float64 they judge every contender."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 512  # rows whose logits are made at a time
LONG, LEARNED = 300_000, 2.75  # words of a text, and the loss of vectors that have seen it once


def linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean over the rows with a target (not -100) of log sum_v exp(s_iv) - s_i,target; s = input weight^T + bias."""
    chosen = (target != -100).nonzero()[:, 0]
    total = input.new_zeros(())
    for rows in chosen.split(SLICE):
        s = input[rows] @ weight.T
        s = s if bias is None else s + bias
        total = total + (s.logsumexp(1) - s.gather(1, target[rows, None])[:, 0]).sum()
    return total / len(chosen)


def skipgram(input_weight: Tensor, output_weight: Tensor, inputs: Tensor, outputs: Tensor, negatives: Tensor) -> Tensor:
    """Mean over pairs of log(1 + exp(-<u, v>)) + sum_k log(1 + exp(<u, n_k>)); no negative is the output."""
    u, v, n = input_weight[inputs], output_weight[outputs], output_weight[negatives]
    return (F.softplus(-(u * v).sum(1)) + F.softplus((u[:, None] * n).sum(2)).sum(1)).mean()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def hubert(x: Tensor, embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean over frames of log sum_c exp(cos(x_i, e_c) / T) - cos(x_i, e_label) / T."""
    s = unit(x) @ unit(embeddings).T / temperature
    return (s.logsumexp(1) - s.gather(1, labels[:, None])[:, 0]).mean()


def wav2vec2(context: Tensor, targets: Tensor, ids: Tensor, temperature: float, seed: int) -> Tensor:
    """Mean over frames (b, t) of log(sum over itself and its distractors j = ids[b, t, :] of exp(cos(c_bt, q_bj) / T))
    - cos(c_bt, q_bt) / T."""
    s = unit(context) @ unit(targets).mT / temperature  # (B, T, T)
    positive = s.diagonal(dim1=1, dim2=2)
    sampled = s.gather(2, ids)
    return (torch.cat([positive[..., None], sampled], 2).logsumexp(2) - positive).mean()


def vectors(result: tuple[Tensor, Tensor], tokens: Tensor, counts: Tensor, **others: object) -> str | None:
    """A pass from zeros: a word's neighbour is told from five other words better than by chance, which costs 6 log 2;
    after the whole text as well as word2vec does it, whose loss is 2.6 then."""
    u, v = (table.double() for table in result)
    if not (u.isfinite().all() and v.isfinite().all()):
        return "a vector is not finite"
    draw = torch.Generator().manual_seed(0)
    negatives = torch.multinomial(counts.double() ** 0.75, 5 * (len(tokens) - 1), replacement=True, generator=draw)
    loss = skipgram(u, v, tokens[1:].long(), tokens[:-1].long(), negatives.view(-1, 5)).item()
    bar = 6 * math.log(2) if len(tokens) < LONG else LEARNED
    return None if loss < bar else f"the loss is {loss:.4f}, not below {bar:.4f}"
