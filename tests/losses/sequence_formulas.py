# SPDX-License-Identifier: Apache-2.0
"""The published forms of the losses over tokens and frames, written out: loops, gathers, all logits.

In float64 they are the truth, in any other dtype what eager code gives. Nothing here comes from the library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def language_model(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    target = labels.flatten()
    rows = F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    asked = target != ignore_index
    rows = rows + z_loss * logits.logsumexp(1).square().where(asked, 0.0)
    if reduction == "none":
        return rows.view(labels.shape)
    return rows[asked].mean() if reduction == "mean" else rows.sum()


def hubert_rows(x: Tensor, units: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """As fairseq's compute_nce and criterion: the true unit's logit, then all C, where its duplicate is -inf. (S,)"""
    positive, negatives = units[labels], units[:, None].expand(-1, len(labels), -1)
    duplicate = (positive == negatives).all(-1)
    logits = F.cosine_similarity(x, torch.cat([positive[None], negatives]), dim=-1) / temperature
    logits = torch.cat([logits[:1], logits[1:].masked_fill(duplicate, -torch.inf)])
    return F.cross_entropy(logits.T, torch.zeros(len(labels), dtype=torch.long), reduction="none")


def wav2vec2_rows(
    context: Tensor, targets: Tensor, mask: Tensor, draws: list[list[list[int]]], temperature: float = 0.1
) -> list[Tensor]:
    """As fairseq, an utterance after the other: (masked frames,) each.

    draws[b][i]: the distractors of the i-th masked frame of utterance b, as numbers of masked frames.
    """
    out = []
    for b in range(len(mask)):
        x, y = context[b][mask[b]], targets[b][mask[b]]
        rows = []
        for i in range(len(x)):
            negatives = y[draws[b][i]]
            logits = F.cosine_similarity(x[i], torch.cat([y[i][None], negatives]), dim=-1) / temperature
            same = torch.cat([torch.tensor([False]), (negatives == y[i]).all(-1)])
            rows.append(-logits.masked_fill(same, -torch.inf).log_softmax(0)[0])
        out.append(torch.stack(rows) if rows else x.new_zeros(0))
    return out


def diversity(probabilities: Tensor) -> Tensor:
    groups, codes = probabilities.shape
    perplexity = torch.exp(-torch.sum(probabilities * torch.log(probabilities + 1e-7), dim=-1)).sum()
    return (groups * codes - perplexity) / (groups * codes)


def cpc_rows(context: Tensor, z: Tensor, predictors: Tensor, negatives: str) -> list[Tensor]:
    """(B, T - k) for each step k."""
    batch, frames, _ = z.shape
    out = []
    for k, w in enumerate(predictors, start=1):
        rows = []
        for b in range(batch):
            keys = z.flatten(0, 1) if negatives == "batch" else z[b]
            for t in range(frames - k):
                scores = keys @ (w @ context[b, t])
                rows.append(scores.logsumexp(0) - z[b, t + k] @ (w @ context[b, t]))
        out.append(torch.stack(rows).view(batch, frames - k))
    return out


def cpc(context: Tensor, z: Tensor, predictors: Tensor, negatives: str = "batch") -> Tensor:
    return torch.stack([rows.mean() for rows in cpc_rows(context, z, predictors, negatives)]).mean()
