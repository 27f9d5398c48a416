# SPDX-License-Identifier: Apache-2.0
"""Contenders for the losses of speech: cosines of a frame with all codes (HuBERT) or some frames (wav2vec 2.0)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS


def first_of(x: Tensor, positive: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Logits of the positive and of the others (number, *frames, D); an other that equals the positive is at -inf."""
    same = (positive == others).all(-1)
    targets = torch.cat([positive.unsqueeze(0), others], dim=0)
    logits = torch.cosine_similarity(x.float(), targets.float(), dim=-1).type_as(x)
    logits = logits / temperature
    if same.any():
        logits[1:][same] = float("-inf")
    return logits


def fairseq_hubert(x: Tensor, embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The class of a frame comes twice, once as the positive and once at -inf. The trainer divides by the frames."""
    positive = torch.index_select(embeddings, 0, labels)
    every = embeddings.unsqueeze(1).expand(-1, len(x), -1)  # (C, S, D)
    logits = first_of(x, positive, every, temperature).transpose(0, 1)
    return F.cross_entropy(logits, labels.new_zeros(len(x)), reduction="sum") / len(x)


def lean_hubert(x: Tensor, embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The duplicate at -inf adds nothing: a cross-entropy over the codes."""
    return F.cross_entropy((F.normalize(x, dim=1) / temperature) @ F.normalize(embeddings, dim=1).t(), labels)


def ours_hubert(x: Tensor, embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    from sslkernels.losses import hubert_loss

    return hubert_loss(x, embeddings, labels, temperature=temperature)


def with_ids(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "seed"}


def fairseq_wav2vec2(context: Tensor, targets: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """The distractors as rows, (K, B, T, D)."""
    b, t, d = targets.shape
    flat = (ids + t * torch.arange(b)[:, None, None]).view(-1)
    negatives = targets.view(-1, d)[flat].view(b, t, -1, d).permute(2, 0, 1, 3)
    logits = first_of(context, targets, negatives, temperature).transpose(0, 2)
    logits = logits.reshape(-1, logits.size(-1))
    return F.cross_entropy(logits, ids.new_zeros(len(logits)), reduction="sum") / len(logits)


def lean_wav2vec2(context: Tensor, targets: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """All cosines of an utterance by one product; a distractor is a column of it."""
    s = torch.bmm(F.normalize(context, dim=2) / temperature, F.normalize(targets, dim=2).mT)
    positive = s.diagonal(dim1=1, dim2=2)
    return F.softplus(s.gather(2, ids).logsumexp(2) - positive).mean()


def with_seed(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "ids"} | {"count": inputs["ids"].shape[2]}


def ours_wav2vec2(context: Tensor, targets: Tensor, temperature: float, seed: int, count: int) -> Tensor:
    """It draws the distractors itself, the same ones."""
    from sslkernels.losses import wav2vec2_loss

    return wav2vec2_loss(context, targets, num_negatives=count, temperature=temperature, seed=seed)


HUBERT = (
    Contender("sslkernels", ours_hubert, OURS),
    Contender("fairseq", fairseq_hubert, "facebookresearch/fairseq, hubert.py, compute_nce, and hubert_criterion.py"),
    Contender("lean", lean_hubert, LEAN),
)
WAV2VEC2 = (
    Contender("sslkernels", ours_wav2vec2, OURS, prepare=with_seed),
    Contender(
        "fairseq", fairseq_wav2vec2, "facebookresearch/fairseq, wav2vec2.py, compute_preds; the distractors are drawn",
        prepare=with_ids,
    ),
    Contender("lean", lean_wav2vec2, LEAN, prepare=with_ids),
)  # fmt: skip
