# SPDX-License-Identifier: Apache-2.0
"""skipgram: scores straight from both tables, and gradients whose rows each belong to one program.

A dense gradient sorts the words (int32, about 0.1 ms for 600,000 on an H100), and a program sums what a word takes part
in, in the order of the pairs: no float atomics, the same bits every time, and every row is written once. Its time is
that of the most frequent word, about a microsecond for 32 of its pairs. All are bound by bytes: (2 + K) rows a pair.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._tiles import LOG2E
from sslkernels.triton._tokens_linear import log1p, total_kernel


@triton.jit
def load_words(ids, at, inside, length):
    """Rows of a table, which exist: an id outside counts as the nearest."""
    word = tl.load(ids + at, mask=inside, other=0)
    return tl.minimum(tl.maximum(word, 0), length - 1), (word >= 0) & (word < length)


@triton.jit
def load_vectors(table, rows, d, inside, row_stride, column_stride):
    at = table + rows[:, None] * row_stride + d[None, :].to(tl.int64) * column_stride
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def next_draw(at, k, draws, inside, positive, length):
    """The word at `at`, which is draw k of each pair, and whether it counts: there is one, and not the positive."""
    more = inside & (tl.zeros_like(positive) + k < draws)
    drawn = tl.load(at, mask=more, other=0)
    return tl.minimum(tl.maximum(drawn, 0), length - 1), more & (drawn != positive)


@triton.jit
def skipgram_kernel(
    u, v, inputs, outputs, negatives, losses, slopes, scale, pairs, draws, input_count, output_count, depth,
    u_row, u_column, v_row, v_column, input_stride, output_stride, negative_row, negative_column,
    SUM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Losses, one a pair or the sum of a program's, and the slopes along the scores. A pair with a bad id is NaN."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = b < pairs
    context, good = load_words(inputs, b * input_stride, inside, input_count)
    own, fine = load_words(outputs, b * output_stride, inside, output_count)
    good = good & fine
    at = negatives + b * negative_row
    for _ in range(0, draws):
        _, fine = load_words(at, tl.zeros_like(b), inside, output_count)
        good = good & fine
        at += negative_column
    loss = tl.zeros((BLOCK_B,), tl.float32)
    at = negatives + b * negative_row
    word = own
    counts = inside
    sign = -1.0  # the positive is pulled, the others are pushed
    for k in range(0, draws + 1):
        s = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            there = inside[:, None] & (d < depth)[None, :]
            s += load_vectors(u, context, d, there, u_row, u_column) * load_vectors(v, word, d, there, v_row, v_column)
        score = tl.where(good, tl.sum(s, 1), float("nan")) * sign
        small = tl.exp2(-tl.abs(score) * LOG2E)
        term = tl.maximum(score, 0.0) + log1p(small)
        slope = sign * tl.where(score < 0, small, 1.0) / (1.0 + small)
        loss += tl.where(counts, term, 0.0)
        tl.store(slopes + b * (draws + 1) + k, tl.where(counts, slope * scale, 0.0), mask=inside)
        positive = tl.load(outputs + b * output_stride, mask=inside, other=0)
        word, counts = next_draw(at, k, draws, inside, positive, output_count)
        at += negative_column
        sign = 1.0
    if SUM:
        tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(losses + b, loss, mask=inside)


@triton.jit
def pair_rows_kernel(
    u, v, inputs, outputs, negatives, grad, slopes, dinput, doutput, pairs, draws, input_count, output_count, depth,
    u_row, u_column, v_row, v_column, input_stride, output_stride, negative_row, negative_column, grad_stride,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each pair adds to its rows: dinput (pairs, depth), doutput (pairs, 1 + draws, depth); None: not wanted."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = b < pairs
    there = inside[:, None] & (d < depth)[None, :]
    context, _ = load_words(inputs, b * input_stride, inside, input_count)
    word, _ = load_words(outputs, b * output_stride, inside, output_count)
    positive = tl.load(outputs + b * output_stride, mask=inside, other=0)
    upstream = tl.load(grad + b * grad_stride, mask=inside, other=0.0).to(tl.float32)
    if doutput is not None:
        own = load_vectors(u, context, d, there, u_row, u_column)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    counts = inside
    at = negatives + b * negative_row
    for k in range(0, draws + 1):
        weight = upstream * tl.load(slopes + b * (draws + 1) + k, mask=inside, other=0.0)
        if dinput is not None:
            vector = load_vectors(v, word, d, there & counts[:, None], v_row, v_column)
            total += tl.where(counts[:, None], weight[:, None] * vector, 0.0)
        if doutput is not None:
            to = doutput + (b * (draws + 1) + k)[:, None] * depth + d[None, :]
            value = tl.where(counts[:, None], weight[:, None] * own, 0.0)
            tl.store(to, value.to(doutput.dtype.element_ty), mask=there)
        word, counts = next_draw(at, k, draws, inside, positive, output_count)
        at += negative_column
    if dinput is not None:
        tl.store(dinput + b[:, None] * depth + d[None, :], total.to(dinput.dtype.element_ty), mask=there)


@triton.jit
def input_sums_kernel(
    table, outputs, negatives, grad, slopes, places, ends, out, draws, length, depth,
    row_stride, column_stride, output_stride, negative_row, negative_column, grad_stride,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row of the input table's gradient: the sum over its pairs, which `places` has from ends[row] on."""
    row = tl.program_id(0)
    end = tl.load(ends + row + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(tl.load(ends + row), end, BLOCK_B):
        i = start + tl.arange(0, BLOCK_B)
        inside = i < end
        b = tl.load(places + i, mask=inside, other=0).to(tl.int64)
        upstream = tl.load(grad + b * grad_stride, mask=inside, other=0.0).to(tl.float32)
        positive = tl.load(outputs + b * output_stride, mask=inside, other=0)
        counts = inside
        word, _ = load_words(outputs, b * output_stride, inside, length)
        at = negatives + b * negative_row
        for k in range(0, draws + 1):
            weight = upstream * tl.load(slopes + b * (draws + 1) + k, mask=counts, other=0.0)
            # what does not count is not read: it may be infinite
            vector = load_vectors(table, word, d, counts[:, None] & (d < depth)[None, :], row_stride, column_stride)
            total += tl.where(counts[:, None], weight[:, None] * vector, 0.0)
            word, counts = next_draw(at, k, draws, inside, positive, length)
            at += negative_column
    to = out + row.to(tl.int64) * depth + d
    tl.store(to, tl.sum(total, 0).to(out.dtype.element_ty), mask=d < depth)


@triton.jit
def output_sums_kernel(
    table, inputs, outputs, negatives, grad, slopes, places, ends, out, draws, length, depth,
    row_stride, column_stride, input_stride, output_stride, negative_row, negative_column, grad_stride,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row of the output table's gradient: the sum over its scores, which `places` has from ends[row] on."""
    row = tl.program_id(0)
    end = tl.load(ends + row + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(tl.load(ends + row), end, BLOCK_B):
        i = start + tl.arange(0, BLOCK_B)
        inside = i < end
        place = tl.load(places + i, mask=inside, other=0).to(tl.int64)
        b = place // (draws + 1)
        k = place - b * (draws + 1)
        positive = tl.load(outputs + b * output_stride, mask=inside, other=0)
        drawn = tl.load(negatives + b * negative_row + (k - 1) * negative_column, mask=inside & (k > 0), other=0)
        counts = inside & ((k == 0) | (drawn != positive))
        weight = tl.load(grad + b * grad_stride, mask=counts, other=0.0).to(tl.float32)
        weight *= tl.load(slopes + place, mask=counts, other=0.0)
        word, _ = load_words(inputs, b * input_stride, counts, length)
        vector = load_vectors(table, word, d, counts[:, None] & (d < depth)[None, :], row_stride, column_stride)
        total += weight[:, None] * vector
    to = out + row.to(tl.int64) * depth + d
    tl.store(to, tl.sum(total, 0).to(out.dtype.element_ty), mask=d < depth)


def skipgram(input_weight, output_weight, inputs, outputs, negatives, reduction, sparse):
    pairs, draws = negatives.shape
    tile, mean = shape("skipgram", input_weight, output_weight), reduction == "mean"
    programs, alone = cdiv(pairs, tile["BLOCK_B"]), reduction == "none"
    losses = input_weight.new_empty(pairs if alone else programs, dtype=torch.float32)
    slopes = input_weight.new_empty(pairs, 1 + draws, dtype=torch.float32)
    scale = 1.0 / max(pairs, 1) if mean else 1.0
    tables = input_weight, output_weight, inputs, outputs, negatives
    sizes = pairs, draws, input_weight.shape[0], output_weight.shape[0], input_weight.shape[1]
    strides = [n for x in tables for n in x.stride()]
    launch(skipgram_kernel, (programs,), *tables, losses, slopes, scale, *sizes, *strides, SUM=not alone, **tile)
    if alone:
        return losses, slopes
    loss = input_weight.new_empty((), dtype=torch.float32)
    launch(total_kernel, (1,), losses, loss, None, programs, pairs, MEAN=mean, **shape("tokens_total", losses))
    return loss, slopes


def skipgram_backward_rows(grad, slopes, input_weight, output_weight, inputs, outputs, negatives, output_mask):
    pairs, draws = negatives.shape
    depth, rows = input_weight.shape[1], (pairs, pairs * (1 + draws))
    tables = input_weight, output_weight, inputs, outputs, negatives
    dinput, doutput = (x.new_empty((n, depth) if wanted else 0) for x, n, wanted in zip(tables, rows, output_mask))
    if any(output_mask):
        tile = shape("skipgram", input_weight, output_weight)
        grid = cdiv(pairs, tile["BLOCK_B"]), cdiv(depth, tile["BLOCK_D"])
        wanted = dinput if output_mask[0] else None, doutput if output_mask[1] else None
        sizes = pairs, draws, input_weight.shape[0], output_weight.shape[0], depth
        strides = [n for x in tables for n in x.stride()]
        upstream = grad, slopes.contiguous()
        launch(pair_rows_kernel, grid, *tables, *upstream, *wanted, *sizes, *strides, _stride(grad), **tile)
    return dinput, doutput


def skipgram_backward(grad, slopes, input_weight, output_weight, inputs, outputs, negatives, output_mask):
    draws, depth = negatives.shape[1], input_weight.shape[1]
    slopes = slopes.contiguous()
    dinput, doutput = (
        torch.empty(x.shape if wanted else 0, dtype=x.dtype, device=x.device)
        for x, wanted in zip((input_weight, output_weight), output_mask)
    )
    tile = shape("skipgram_sums", input_weight, output_weight)
    columns = cdiv(depth, tile["BLOCK_D"])
    upstream = _stride(grad)
    if output_mask[0]:
        length = input_weight.shape[0]
        launch(
            input_sums_kernel, (length, columns), output_weight, outputs, negatives, grad, slopes,
            *_by_word(inputs, length), dinput, draws, output_weight.shape[0], depth, *output_weight.stride(),
            *outputs.stride(), *negatives.stride(), upstream, **tile,
        )  # fmt: skip
    if output_mask[1]:
        length = output_weight.shape[0]
        words = torch.cat((outputs[:, None], negatives), 1).flatten()
        launch(
            output_sums_kernel, (length, columns), input_weight, inputs, outputs, negatives, grad, slopes,
            *_by_word(words, length), doutput, draws, input_weight.shape[0], depth, *input_weight.stride(),
            *inputs.stride(), *outputs.stride(), *negatives.stride(), upstream, **tile,
        )  # fmt: skip
    return dinput, doutput


def _stride(grad):
    return grad.stride(0) if grad.ndim else 0


def _by_word(words, length):
    """Where each word stands, in order: places, and of row i those from ends[i] to ends[i + 1]."""
    ordered, places = words.clamp(0, length - 1).int().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(length + 1, dtype=torch.int32, device=words.device), out_int32=True)
    return places, ends
