# SPDX-License-Identifier: Apache-2.0
"""Contenders for word vectors: skip-gram with negative sampling, as a loss and as a pass over a text.

gensim is gensim itself. Its model goes on from where the last sample left it; ours starts each sample from the same
tables. Both make as many steps, at one learning rate.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
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


# --- A pass over a text --------------------------------------------------------------------------------------------

WINDOW, NEGATIVES, SAMPLE, RATE = 5, 5, 1e-3, 0.025


def gensim_model(inputs: Inputs) -> Inputs:
    """Its vocabulary and tables are made before the clock starts, and the sentences are lists of words."""
    from gensim.models import Word2Vec

    size = inputs["input_weight"].shape[1]
    model = Word2Vec(
        sg=1, hs=0, vector_size=size, window=WINDOW, negative=NEGATIVES, sample=SAMPLE, alpha=RATE, min_alpha=RATE,
        min_count=1, workers=torch.get_num_threads(), seed=1,
    )  # fmt: skip
    model.build_vocab_from_freq({str(word): count for word, count in enumerate(inputs["counts"].tolist())})
    words = [str(word) for word in inputs["tokens"].tolist()]
    ends = inputs["offsets"].tolist()
    return {"model": model, "sentences": [words[a:b] for a, b in pairwise(ends)], "size": len(words)}


def gensim_pass(model: Any, sentences: list[list[str]], size: int) -> Any:
    model.train(sentences, total_words=size, epochs=1, start_alpha=RATE, end_alpha=RATE)
    return model


def gensim_tables(model: Any) -> tuple[Tensor, Tensor]:
    """By our numbers of the words."""
    order = torch.tensor([model.wv.key_to_index[str(word)] for word in range(len(model.wv))])
    return torch.from_numpy(model.wv.vectors)[order], torch.from_numpy(model.syn1neg)[order]


def prepared(inputs: Inputs) -> Inputs:
    """The alias table and the probabilities to keep a word, as gensim makes its tables."""
    from sslkernels.ops import alias_table

    counts = inputs["counts"].double()
    share = counts / (SAMPLE * counts.sum())
    keep = ((share.sqrt() + 1) / share).clamp(max=1).float()
    names = ("input_weight", "output_weight", "tokens", "offsets")
    return {**{name: inputs[name] for name in names}, "keep": keep, "table": alias_table(counts**0.75)}


def ours_pass(
    input_weight: Tensor, output_weight: Tensor, tokens: Tensor, offsets: Tensor, keep: Tensor, table: Any,
    hogwild: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from sslkernels.ops import skipgram_update_

    skipgram_update_(
        input_weight, output_weight, tokens, offsets, RATE, table, window=WINDOW, negatives=NEGATIVES, keep=keep,
        seed=1, hogwild=hogwild,
    )  # fmt: skip
    return input_weight, output_weight


def ours_hogwild(**inputs: Any) -> tuple[Tensor, Tensor]:
    return ours_pass(**inputs, hogwild=True)


TABLES = ("input_weight", "output_weight")
GENSIM = Contender(
    "gensim",
    gensim_pass,
    "gensim 4.4, Word2Vec(sg=1), a worker for each thread",
    prepare=gensim_model,
    result=gensim_tables,
    real=True,
)
UPDATE = (Contender("sslkernels", ours_pass, OURS, prepare=prepared, changes=TABLES), GENSIM)
HOGWILD = (
    Contender("sslkernels", ours_hogwild, f"{OURS}, hogwild=True", prepare=prepared, changes=TABLES),
    GENSIM,
)
PEER = "Andras7/word2vec-pytorch, model.py"
SKIPGRAM = (
    Contender("sslkernels", ours, OURS),
    Contender("sslkernels-sparse", ours_sparse, f"{OURS}, sparse=True"),
    Contender("word2vec-pytorch", word2vec_pytorch, f"{PEER}, sparse gradients"),
    Contender("word2vec-pytorch-dense", word2vec_pytorch_dense, f"{PEER}, dense gradients"),
    Contender("lean", lean, f"{LEAN}, dense gradients"),
)
