# SPDX-License-Identifier: Apache-2.0
"""The ops of tokens on a GPU; signatures are the schemas'."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.triton import _tokens_linear as linear
from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._panel import PANEL_BYTES, panel_rows
from sslkernels.triton._tiles import precision
from sslkernels.triton._tokens_skipgram import skipgram, skipgram_backward, skipgram_backward_rows

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "linear_cross_entropy_rows_backward",
    "skipgram",
    "skipgram_backward",
    "skipgram_backward_rows",
]

LEAST_PANEL = 64 << 20
ALIGNED = 64  # elements: rows of a panel begin where 16-byte accesses may


class _Head(NamedTuple):
    """The layer and the rows, of which the first `counted` of `order` count."""

    input: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None
    target: Tensor
    order: Tensor  # (N) int32
    counted: Tensor  # (1) int32
    smoothing: float
    z: float

    def sizes(self) -> tuple[int, int, int]:
        return *self.input.shape, self.weight.shape[0]

    def layer(self) -> tuple:
        return self.input, self.weight, self.bias, self.target, self.order, self.counted

    def strides(self) -> tuple[int, ...]:
        bias = 1 if self.bias is None else self.bias.stride(0)
        return *self.input.stride(), *self.weight.stride(), bias, self.target.stride(0)

    def dtype(self) -> torch.dtype:
        """What a panel is of: 16 bits where both operands are of the same."""
        return self.input.dtype if self.input.dtype == self.weight.dtype else torch.float32


def _head(input, weight, bias, target, ignore_index, smoothing, z) -> _Head:
    n = input.shape[0]
    order, count = (input.new_empty(size, dtype=torch.int32) for size in (n, 1))
    operands = target, order, count, n, ignore_index, target.stride(0)
    launch(linear.select_kernel, (1,), *operands, **shape("tokens_select", input))
    return _Head(input, weight, bias, target, order, count, smoothing, z)


class _Chunks:
    """The rows in chunks, and what a chunk needs beside the inputs, made once for all of them.

    A panel is as large as the layer, so that it has as many rows as the layer has features, but at least 64 and at most
    512 MiB: with fewer rows the layer's gradient would be read and written again for longer than products take.
    """

    def __init__(self, head: _Head, mask: list[bool], limit: int) -> None:
        n, d, v = head.sizes()
        self.head, self.mask, self.tile = head, mask, shape("tokens_logits", head.input, head.weight)
        self.strips = cdiv(v, self.tile["BLOCK_M"])
        width, dtype = cdiv(v, ALIGNED) * ALIGNED, head.dtype()
        limit = max(limit, min(PANEL_BYTES, max(LEAST_PANEL, v * d * dtype.itemsize)))
        # a few features or classes: what a row has beside the panel counts
        columns, itemsize = (max(width, 4 * d), dtype.itemsize) if any(mask) else (2 * self.strips, 4)
        self.rows = panel_rows(n, columns, itemsize, limit, self.tile["BLOCK_N"])
        self.chunks = [(first, min(self.rows, n - first)) for first in range(0, n, self.rows)]
        new = head.input.new_empty
        self.partial = new(2, self.strips, self.rows, dtype=torch.float32)
        self.panel = self.known = self.hidden = None
        if any(mask):
            self.panel = new(self.rows, width, dtype=dtype)
            self.known = new(4, self.rows, dtype=torch.float32)
            self.hidden = new(self.rows, d, dtype=dtype)

    @functools.cached_property
    def sums(self) -> list[Tensor | None]:
        """Of the layer and the bias over the classes, where smoothing asks for all logits' mean."""
        smooth, head = self.head.smoothing > 0, self.head
        return [x.sum(0, dtype=torch.float32) if smooth and x is not None else None for x in (head.weight, head.bias)]

    def logits(self, first: int, rows: int, known: Tensor | None = None) -> None:
        head = self.head
        n, d, v = head.sizes()
        grid = (cdiv(rows, self.tile["BLOCK_N"]) * self.strips,)
        panel_row = 0 if self.panel is None else self.panel.stride(0)
        launch(
            linear.logits_kernel, grid, *head.layer(), self.partial, known, self.panel, first, rows, n, v, d,
            *head.strides(), panel_row, EVEN=d % self.tile["BLOCK_D"] == 0, PRECISION=precision(), **self.tile,
        )  # fmt: skip

    def meet(self, first: int, rows: int, losses: Tensor, stats: Tensor | None) -> None:
        """Losses, and the slopes if there will be gradients."""
        self.logits(first, rows)
        head = self.head
        n, d, v = head.sizes()
        tile = shape("tokens_join", head.input)
        launch(
            linear.join_kernel, (cdiv(rows, tile["BLOCK_R"]),), *head.layer(), *self.sums, self.partial, losses, stats,
            self.known, self.hidden, first, rows, n, v, d, head.smoothing, head.z, *head.strides(),
            BLOCK_V=self.tile["BLOCK_M"], **tile,
        )  # fmt: skip
        if self.panel is None:
            return
        tile = shape("tokens_slopes", self.panel)
        launch(
            linear.slopes_kernel, (cdiv(rows, tile["BLOCK_R"]) * self.strips,), self.panel, self.partial, self.known,
            head.target, head.order, head.counted, first, rows, v, head.target.stride(0), self.panel.stride(0),
            BLOCK_V=self.tile["BLOCK_M"], **tile,
        )  # fmt: skip

    def recall(self, first: int, rows: int, grad: Tensor, stats: Tensor) -> None:
        """The slopes, from what was found of the rows before."""
        head = self.head
        n, d, v = head.sizes()
        tile = shape("tokens_gather", head.input)
        launch(
            linear.recall_kernel, (cdiv(rows, tile["BLOCK_R"]),), head.input, head.target, head.order, head.counted,
            stats, grad, self.known, self.hidden, first, rows, n, v, d, head.smoothing, head.z, *head.input.stride(),
            head.target.stride(0), grad.stride(0), **tile,
        )  # fmt: skip
        self.logits(first, rows, self.known)

    def differentiate(self, first: int, rows: int, grads: list[Tensor], mean: bool) -> None:
        head, panel = self.head, self.panel
        dinput, dweight, dbias = grads
        assert panel is not None
        _, d, v = head.sizes()
        panel_row, tile, where = panel.stride(0), shape("tokens_product", panel), (first, rows)
        if self.mask[0]:
            tiles = cdiv(rows, tile["BLOCK_M"]) * cdiv(d, tile["BLOCK_N"])
            # a few rows that count have few tiles: sums over parts of the classes, so that they fill the device too
            splits = min(max(2 * multiprocessors(panel) // tiles, 1), 16, cdiv(v, tile["BLOCK_K"]))
            strip = cdiv(cdiv(v, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
            splits = cdiv(v, strip)
            partial = panel.new_empty(splits, rows, d, dtype=torch.float32)
            launch(
                linear.input_kernel, (splits * tiles,), panel, head.weight, partial, head.counted, *where, v, strip, d,
                panel_row, *head.weight.stride(), PRECISION=precision(), **tile,
            )  # fmt: skip
            gather = shape("tokens_gather", head.input)
            launch(
                linear.spread_kernel, (cdiv(rows, gather["BLOCK_R"]),), partial, dinput, head.order, head.counted,
                *where, splits, rows * d, d, MEAN=mean, **gather,
            )  # fmt: skip
        if self.mask[1]:
            launch(
                linear.layer_kernel, (cdiv(v, tile["BLOCK_M"]) * cdiv(d, tile["BLOCK_N"]),), panel, self.hidden,
                dweight, head.counted, *where, v, d, panel_row, MEAN=mean, PRECISION=precision(), **tile,
            )  # fmt: skip
        if self.mask[2]:
            columns = shape("tokens_bias", panel)
            launch(
                linear.bias_kernel, (cdiv(v, columns["BLOCK_V"]),), panel, dbias, head.counted, *where, v, panel_row,
                MEAN=mean, **columns,
            )  # fmt: skip


def _gradients(head: _Head, mask: list[bool], dtype: torch.dtype) -> list[Tensor]:
    """Room for them; the layer's are float32, since chunks add to them, and zero where there is no chunk."""
    dtypes = dtype, torch.float32, torch.float32
    bias = head.weight if head.bias is None else head.bias
    grads = [
        head.input.new_empty(x.shape if wanted else 0, dtype=kind)
        for x, kind, wanted in zip((head.input, head.weight, bias), dtypes, mask)
    ]
    if head.input.shape[0] == 0:
        for x in grads:
            x.zero_()
    return grads


def linear_cross_entropy(
    input, weight, bias, target, ignore_index, label_smoothing, z_loss, mean, panel_bytes, output_mask
):
    head = _head(input, weight, bias, target, ignore_index, label_smoothing, z_loss)
    losses, loss = (input.new_empty(size, dtype=torch.float32) for size in (target.shape, ()))
    grads = _gradients(head, output_mask, torch.float32)
    chunks = _Chunks(head, output_mask, panel_bytes)
    for chunk in chunks.chunks:
        chunks.meet(*chunk, losses, None)
        if any(output_mask):
            chunks.differentiate(*chunk, grads, mean)
    operands = losses, loss, head.counted, input.shape[0], 0
    launch(linear.total_kernel, (1,), *operands, MEAN=mean, **shape("tokens_total", losses))
    return loss, *grads


def linear_cross_entropy_rows(input, weight, bias, target, ignore_index, label_smoothing, z_loss):
    head = _head(input, weight, bias, target, ignore_index, label_smoothing, z_loss)
    losses, stats = (input.new_empty(size, dtype=torch.float32) for size in (target.shape, (3, *target.shape)))
    chunks = _Chunks(head, [False] * 3, 0)
    for chunk in chunks.chunks:
        chunks.meet(*chunk, losses, stats)
    return losses, stats


def linear_cross_entropy_rows_backward(
    grad, input, weight, bias, target, stats, ignore_index, label_smoothing, z_loss, output_mask
):
    head = _head(input, weight, bias, target, ignore_index, label_smoothing, z_loss)
    grads = _gradients(head, output_mask, input.dtype)
    if any(output_mask):
        chunks = _Chunks(head, output_mask, 0)
        for chunk in chunks.chunks:
            chunks.recall(*chunk, grad, stats.contiguous())
            chunks.differentiate(*chunk, grads, False)
    like = input, weight, bias
    return tuple(g.to(x.dtype) if wanted else stats.new_empty(0) for g, x, wanted in zip(grads, like, output_mask))
