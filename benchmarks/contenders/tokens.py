# SPDX-License-Identifier: Apache-2.0
"""Contenders for the cross-entropy over a vocabulary: the logits stored, or rows of them at a time.

Of masked tokens those with a target are gathered first, as BERT, RoBERTa and ModernBERT do, but where a peer does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender
from benchmarks.contenders.contrastive import LEAN, OURS

IGNORED = -100
LEAN_ROWS = 512


def chosen(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    rows = target != IGNORED
    return input[rows], target[rows]


def gathered(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, labels = chosen(input, target)
    return F.cross_entropy(F.linear(rows, weight, bias), labels)


def every_row(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits of every token; the loss leaves out those without a target. transformers shifts a causal target by one,
    which is done already here."""
    return F.cross_entropy(F.linear(input, weight, bias).float(), target, ignore_index=IGNORED)


def torch_chunked(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13
    from torch.nn.functional import linear_cross_entropy

    rows, labels = chosen(input, target)
    options = LinearCrossEntropyOptions(batch_chunk_size=min(chunk, len(rows)) if chunk else None)
    return linear_cross_entropy(rows, weight, labels, linear_bias=bias, options=options)


def torch_chunked_512(*inputs: Tensor, **named: Tensor) -> Tensor:
    return torch_chunked(*inputs, **named, chunk=512)


class LigerChunks(torch.autograd.Function):
    """So few rows at a time that their logits take no more memory than the input; gradients in the forward. What their
    kernel does to a row is written as whole operations here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        (n, d), v = x.shape, len(weight)
        share = -(-n // -(-v // d))
        size = min(1 << (share - 1).bit_length(), n)
        count = (target != IGNORED).sum().item()
        dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        losses = torch.zeros(n, device=x.device)
        for start in range(0, n, size):
            rows = x[start : start + size]
            logits = rows @ weight.t()
            if bias is not None:
                logits = logits + bias
            labels = target[start : start + size, None]
            lse = logits.logsumexp(1, keepdim=True)
            losses[start : start + size] = (lse - logits.gather(1, labels))[:, 0] / count
            logits.sub_(lse).exp_().scatter_add_(1, labels, logits.new_full(labels.shape, -1.0)).div_(count)
            dx[start : start + size] = logits @ weight
            dweight += torch.mm(logits.t(), rows)
            if dbias is not None:
                torch.add(dbias, logits.sum(0), out=dbias)
        ctx.save_for_backward(dx, dweight, dbias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        dx, dweight, dbias = ctx.saved_tensors
        if not torch.equal(grads[0], torch.ones(())):
            for gradient in (dx, dweight, dbias):
                if gradient is not None:
                    gradient.mul_(grads[0])
        return dx, dweight, None, dbias


def liger(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, labels = chosen(input, target)
    return LigerChunks.apply(rows, weight, labels, bias)


class LeanChunks(torch.autograd.Function):
    """Some hundred rows at a time in one buffer, in place, every gradient by a product that adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        n, scale = len(x), 1 / len(x)
        buffer = x.new_empty(min(n, LEAN_ROWS), len(weight))
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        loss = x.new_zeros((), dtype=torch.float64)
        for start in range(0, n, LEAN_ROWS):
            part = slice(start, start + LEAN_ROWS)
            rows, labels = x[part], target[part, None]
            log_p = buffer[: len(rows)]
            if bias is None:
                torch.mm(rows, weight.t(), out=log_p)
            else:
                torch.addmm(bias, rows, weight.t(), out=log_p)
            torch.log_softmax(log_p, 1, out=log_p)
            loss -= log_p.gather(1, labels).sum()
            p = log_p.exp_().scatter_add_(1, labels, log_p.new_full(labels.shape, -1.0))
            torch.addmm(dx[part], p, weight, beta=0, alpha=scale, out=dx[part])
            torch.addmm(dweight, p.t(), rows, beta=min(start, 1), alpha=scale, out=dweight)
            if dbias is not None:
                dbias.add_(p.sum(0), alpha=scale)
        ctx.save_for_backward(dx, dweight, dbias)
        return (loss * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        dx, dweight, dbias = ctx.saved_tensors
        if grads[0] != 1:
            torch._foreach_mul_([g for g in (dx, dweight, dbias) if g is not None], grads[0])
        return dx, dweight, None, dbias


def lean(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, labels = chosen(input, target)
    return LeanChunks.apply(rows, weight, labels, bias)


def ours(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    from sslkernels.ops import linear_cross_entropy

    return linear_cross_entropy(input, weight, target, linear_bias=bias, ignore_index=IGNORED)


ROUNDED = 2e-2  # what 16 bits may be off
TORCH = "torch 2.13, F.linear_cross_entropy with LinearCrossEntropyOptions"
SSL = Contender("sslkernels", ours, OURS)
GATHERED = Contender(
    "fairseq", gathered, "facebookresearch/fairseq, roberta/model.py, masked_tokens; as transformers, ModernBERT"
)
EVERY = Contender("transformers", every_row, "transformers, loss/loss_utils.py")
CHUNKED = Contender("torch", torch_chunked, f"{TORCH}()", real=True)
WIDER = Contender("torch-512", torch_chunked_512, f"{TORCH}(batch_chunk_size=512)", real=True)
LIGER = Contender("liger", liger, "linkedin/Liger-Kernel, ops/fused_linear_cross_entropy.py, its kernel in torch")
PLAIN = Contender("lean", lean, f"{LEAN}, {LEAN_ROWS} rows at a time")

# A few rows at a time read and write every weight again and again: by their own rules torch and Liger take 4 and 8 rows
# of 307 here, and many seconds for a step. They are timed at a small size.
SMALL = (SSL, EVERY, CHUNKED, LIGER, PLAIN)
MASKED = (SSL, GATHERED, EVERY, WIDER, PLAIN)
CAUSAL = (SSL, EVERY, WIDER, PLAIN)
BFLOAT16 = tuple(replace(c, limit=ROUNDED) for c in (SSL, GATHERED, WIDER))
