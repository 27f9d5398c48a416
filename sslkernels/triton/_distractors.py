# SPDX-License-Identifier: Apache-2.0
"""The distractors of wav2vec 2.0, counted: a program draws for one frame and compares its draws with tiles of frames.

Integers only, so a count is exact in any order. Each of L^2 counts a sample takes `count` compare-and-adds: 32 samples
of 1,500 frames with 100 draws are 7e9, about 0.5 ms on an H100; writing them is 0.1 ms.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._launch import launch, shape
from sslkernels.triton._philox import below, random_words


@triton.jit
def distractor_counts_kernel(
    seed, lengths, out, length, count, lengths_stride, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    i = (row % length).to(tl.int32)
    n = tl.load(lengths + sample * lengths_stride)
    n = tl.minimum(tl.maximum(n, 0), length).to(tl.int32)
    number = tl.load(seed)
    out += row * length
    for start in range(0, length, BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        total = tl.zeros((BLOCK_L,), tl.int32)
        if (i < n) & (n > 1):
            for first in range(0, count, BLOCK_C):
                c = first + tl.arange(0, BLOCK_C)
                index = i.to(tl.int64) * count + c
                drawn = below(random_words(number, tl.zeros_like(index) + sample, index), n - 1)
                drawn = tl.where(c < count, drawn + (drawn >= i).to(tl.int32), -1)
                total += tl.sum((drawn[:, None] == j[None, :]).to(tl.int32), 0)
        tl.store(out + j, total.to(tl.float32), mask=j < length)


def distractor_counts(seed, lengths, length, count):
    batch = lengths.shape[0]
    out = seed.new_empty(batch, length, length, dtype=torch.float32)
    operands = seed, lengths, out, length, count, lengths.stride(0)
    launch(distractor_counts_kernel, (batch * length,), *operands, **shape("distractors", out))
    return out
