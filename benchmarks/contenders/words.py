# SPDX-License-Identifier: Apache-2.0
"""Contenders for word vectors: skip-gram with negative sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender
from benchmarks.contenders.contrastive import LEAN, OURS


def word2vec_pytorch(
    input_weight: Tensor, output_weight: Tensor, inputs: Tensor, outputs: Tensor, negatives: Tensor, sparse: bool = True
) -> Tensor:
    u = F.embedding(inputs, input_weight, sparse=sparse)
    v = F.embedding(outputs, output_weight, sparse=sparse)
    n = F.embedding(negatives, output_weight, sparse=sparse)  # (B, K, D)
    positive = torch.clamp(torch.sum(torch.mul(u, v), dim=1), max=10, min=-10)
    negative = torch.clamp(torch.bmm(n, u.unsqueeze(2)).squeeze(2), max=10, min=-10)
    return torch.mean(-F.logsigmoid(positive) - torch.sum(F.logsigmoid(-negative), dim=1))


def word2vec_pytorch_dense(**inputs: Tensor) -> Tensor:
    return word2vec_pytorch(**inputs, sparse=False)


def lean(input_weight: Tensor, output_weight: Tensor, inputs: Tensor, outputs: Tensor, negatives: Tensor) -> Tensor:
    """Positive and negatives in one gather and one product."""
    rows = F.embedding(torch.cat([outputs[:, None], negatives], 1), output_weight)  # (B, 1 + K, D)
    s = torch.bmm(rows, F.embedding(inputs, input_weight)[:, :, None])[..., 0]
    return (F.softplus(-s[:, 0]).sum() + F.softplus(s[:, 1:]).sum()) / len(inputs)


def ours(
    input_weight: Tensor, output_weight: Tensor, inputs: Tensor, outputs: Tensor, negatives: Tensor,
    sparse: bool = False,
) -> Tensor:  # fmt: skip
    from sslkernels.ops import skipgram

    return skipgram(input_weight, output_weight, inputs, outputs, negatives, reduction="mean", sparse=sparse)


def ours_sparse(**inputs: Tensor) -> Tensor:
    return ours(**inputs, sparse=True)


PEER = "Andras7/word2vec-pytorch, model.py"
SKIPGRAM = (
    Contender("sslkernels", ours, OURS),
    Contender("sslkernels-sparse", ours_sparse, f"{OURS}, sparse=True"),
    Contender("word2vec-pytorch", word2vec_pytorch, f"{PEER}, sparse gradients"),
    Contender("word2vec-pytorch-dense", word2vec_pytorch_dense, f"{PEER}, dense gradients"),
    Contender("lean", lean, f"{LEAN}, dense gradients"),
)
