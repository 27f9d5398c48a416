# SPDX-License-Identifier: Apache-2.0
"""The token cases: a vocabulary at the end of a language model, word vectors, and the codes of speech."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import torch
from torch import Tensor

from benchmarks.case import SEED, Case, Contender, Goal, Inputs, faster, memory
from benchmarks.contenders import speech, tokens, words
from benchmarks.floors import Gemms
from benchmarks.formulas import tokens as formulas

CHOSEN = 0.15  # of BERT's tokens
TEMPERATURE = 0.1


def causal_inputs(generator: torch.Generator, N: int, D: int, V: int) -> Inputs:
    """Every token has a target, which the hidden state leans to; weights as BERT and GPT-2 draw them."""
    weight = 0.02 * torch.randn(V, D, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    hidden = torch.randn(N, D, generator=generator) + 100 / D**0.5 * weight[target]
    return {"input": hidden.requires_grad_(), "weight": weight.requires_grad_(), "target": target}


def masked_inputs(generator: torch.Generator, N: int, D: int, V: int) -> Inputs:
    """A target for some tokens, and a bias."""
    inputs = causal_inputs(generator, N, D, V)
    ignored = torch.randperm(N, generator=generator)[round(CHOSEN * N) :]
    bias = 0.1 * torch.randn(V, generator=generator)
    return {**inputs, "target": inputs["target"].index_fill(0, ignored, -100), "bias": bias.requires_grad_()}


def bfloat16_inputs(generator: torch.Generator, N: int, D: int, V: int) -> Inputs:
    inputs = causal_inputs(generator, N, D, V)
    ignored = torch.randperm(N, generator=generator)[round(CHOSEN * N) :]
    hidden, weight = (inputs[name].detach().bfloat16().requires_grad_() for name in ("input", "weight"))
    return {"input": hidden, "weight": weight, "target": inputs["target"].index_fill(0, ignored, -100)}


def chosen_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return tokens.chosen(inputs["input"].detach(), inputs["target"])[0], inputs["weight"].detach()


def skipgram_inputs(generator: torch.Generator, N: int, K: int, V: int, D: int) -> Inputs:
    """Words as often as Zipf has them, negatives by the power of 3/4; none of them is the output."""
    frequency = 1 / torch.arange(1, V + 1)
    ids = torch.multinomial(frequency, 2 * N, replacement=True, generator=generator).view(2, N)
    negatives = torch.multinomial(frequency**0.75, N * K, replacement=True, generator=generator).view(N, K)
    negatives = torch.where(negatives == ids[1, :, None], (negatives + 1) % V, negatives)
    input_weight, output_weight = (0.1 * torch.randn(V, D, generator=generator) for _ in range(2))
    return {
        "input_weight": input_weight.requires_grad_(), "output_weight": output_weight.requires_grad_(),
        "inputs": ids[0], "outputs": ids[1], "negatives": negatives,
    }  # fmt: skip


def text_inputs(generator: torch.Generator, T: int, D: int) -> Inputs:
    """The Lee corpus, an article in one piece; its words that come five times or more, up to T of them."""
    from sslkernels.text import lee_background, words

    articles = [words(" ".join(article)) for article in lee_background()]
    counts = {word: count for word, count in Counter(chain(*articles)).most_common() if count >= 5}
    number = {word: i for i, word in enumerate(counts)}
    ids = [[number[word] for word in article if word in number] for article in articles]
    tokens, lengths = torch.tensor(list(chain(*ids))), torch.tensor([len(article) for article in ids])
    again = -(-T // len(tokens))
    ends = lengths.repeat(again).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[ends < T], ends.new_full((1,), T)])
    return {
        "input_weight": (torch.rand(len(counts), D, generator=generator) - 0.5) / D,
        "output_weight": torch.zeros(len(counts), D),
        "tokens": tokens.repeat(again)[:T], "offsets": offsets, "counts": torch.tensor(list(counts.values())),
    }  # fmt: skip


def frames_inputs(generator: torch.Generator, B: int, T: int, D: int, K: int) -> Inputs:
    """The masked frames of utterances of 10 s. All use the distractors that our loss draws."""
    from sslkernels.ops.contrastive import distractor_counts

    targets = torch.randn(B, T, D, generator=generator)
    context = targets + torch.randn(B, T, D, generator=generator)
    counts = distractor_counts(torch.full((B,), T), T, K, seed=SEED).long()
    ids = torch.arange(T).expand(B, T, T).flatten().repeat_interleave(counts.flatten()).view(B, T, K)
    return {
        "context": context.requires_grad_(), "targets": targets.requires_grad_(), "ids": ids,
        "temperature": TEMPERATURE, "seed": SEED,
    }  # fmt: skip


def hubert_inputs(generator: torch.Generator, S: int, C: int, D: int) -> Inputs:
    embeddings = torch.rand(C, D, generator=generator) - 0.5
    labels = torch.randint(C, (S,), generator=generator)
    x = embeddings[labels] + torch.randn(S, D, generator=generator)
    return {
        "x": x.requires_grad_(), "embeddings": embeddings.requires_grad_(), "labels": labels,
        "temperature": TEMPERATURE,
    }  # fmt: skip


def linear(
    name: str, N: int, D: int, V: int, inputs, contenders: tuple[Contender, ...], *goals: Goal, variant: str,
    floor: bool = True, slow: bool = False,
) -> Case:  # fmt: skip
    shipped = ("fairseq", "transformers", "torch", "torch-512", "liger")
    have = {contender.name for contender in contenders}
    return Case(
        f"linear_cross_entropy-{name}", "linear_cross_entropy", {"N": N, "D": D, "V": V}, inputs, contenders,
        eager=tuple(peer for peer in shipped if peer in have), formula=formulas.linear_cross_entropy,
        floor=Gemms(chosen_rows, 3) if floor else None, goals=goals, variant=variant, slow=slow,
    )  # fmt: skip


def update(name: str, contenders: tuple[Contender, ...], at_least: float) -> Case:
    return Case(
        name, "skipgram_update_", {"T": 300_000, "D": 100}, text_inputs, contenders, eager=("gensim",),
        holds=formulas.vectors, goals=(faster("gensim", at_least),), variant=name.partition("-")[2], memory=False,
    )  # fmt: skip


CASES = (
    linear("small", 512, 256, 4000, causal_inputs, tokens.SMALL, variant="causal"),
    linear(
        "masked", 2048, 768, 30522, masked_inputs, tokens.MASKED, faster("fairseq", 1.2), faster("lean", 1.0),
        memory("fairseq", 0.10), variant="15% masked", slow=True,
    ),
    linear(
        "causal", 4096, 512, 50257, causal_inputs, tokens.CAUSAL, faster("transformers", 1.0),
        memory("transformers", 0.05), variant="causal", slow=True,
    ),
    linear("bfloat16", 2048, 768, 30522, bfloat16_inputs, tokens.BFLOAT16, variant="15% masked, bfloat16", floor=False),
    Case(
        "skipgram", "skipgram", {"N": 10_000, "K": 5, "V": 10_000, "D": 100}, skipgram_inputs, words.SKIPGRAM,
        eager=("word2vec-pytorch",), formula=formulas.skipgram,
    ),
    update("skipgram_update", words.UPDATE, 0.6),
    update("skipgram_update-hogwild", words.HOGWILD, 1.0),
    Case(
        "hubert", "hubert_loss", {"S": 2140, "C": 504, "D": 256}, hubert_inputs, speech.HUBERT,
        eager=("fairseq",), formula=formulas.hubert, slow=True,
    ),
    Case(
        "wav2vec2", "wav2vec2_loss", {"B": 8, "T": 245, "D": 256, "K": 100}, frames_inputs, speech.WAV2VEC2,
        eager=("fairseq",), formula=formulas.wav2vec2, slow=True,
    ),
)  # fmt: skip
