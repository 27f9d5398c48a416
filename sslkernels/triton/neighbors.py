# SPDX-License-Identifier: Apache-2.0
"""nearest and topk_similarity on a GPU; signatures are the schemas'."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from sslkernels.triton import _neighbors as kernels
from sslkernels.triton._launch import architecture, cdiv, launch, multiprocessors, shape
from sslkernels.triton._panel import panel_rows
from sslkernels.triton._tiles import precision

__all__ = ["nearest", "topk_similarity"]

IN_REGISTERS = 32  # neighbours of a row; more are chosen by torch.topk from a panel of scores
PANEL_BYTES = 128 << 20  # torch.topk may want twice as much again


class _Search:
    """Queries, keys, and what of the keys is computed once."""

    def __init__(self, queries: Tensor, keys: Tensor | None, metric: str, exclude_self: bool) -> None:
        self.queries, self.keys, self.metric = queries, queries if keys is None else keys, metric
        self.exclude = exclude_self
        self.n, self.m, self.depth = *queries.shape[:1], *self.keys.shape
        self.narrow = queries.dtype == self.keys.dtype != torch.float32
        self.centre: Tensor | None = None
        self.shifted: Tensor | None = None
        self.weights: Tensor | None = None
        if metric != "dot" and self.m:
            self._prepare()

    def _prepare(self) -> None:
        keys, new = self.keys, functools.partial(self.keys.new_empty, dtype=torch.float32)
        operands = self.m, self.depth, *keys.stride()
        if self.metric == "l2":
            self.centre, self.shifted = new(self.depth), keys.new_empty(1, dtype=torch.int32)
            launch(kernels.centre_kernel, (1,), keys, self.centre, self.shifted, *operands, **shape("centre", keys))
        self.weights, tile = new(self.m), shape("neighbor_rows", keys)
        grid = (cdiv(self.m, tile["BLOCK_R"]),)
        launch(kernels.weights_kernel, grid, keys, self.centre, self.weights, *operands, METRIC=self.metric, **tile)

    def operands(self) -> tuple:
        return self.queries, self.keys, self.centre, self.shifted, self.weights

    def strides(self) -> tuple[int, ...]:
        return *self.queries.stride(), *self.keys.stride()

    def constants(self, tile: dict[str, int]) -> dict[str, Any]:
        # 16-bit rows counted from another centre have more bits: three tf32 products, where there are any
        split = self.narrow and self.metric == "l2" and architecture(self.keys).startswith("sm_")
        return {
            "METRIC": self.metric,
            "NARROW": self.narrow,
            "EXCLUDE": self.exclude,
            "EVEN": self.depth % tile["BLOCK_D"] == 0,
            "PRECISION": "tf32x3" if split else precision(),
            **tile,
        }

    def split(self, tile: dict[str, int]) -> tuple[int, int, int]:
        """Programs, parts of the keys, and keys of a part: as many as fill the device twice where queries are few."""
        blocks = cdiv(self.n, tile["BLOCK_N"])
        splits = min(max(2 * multiprocessors(self.keys) // max(blocks, 1), 1), 64)
        part = max(cdiv(cdiv(self.m, splits), tile["BLOCK_M"]), 1) * tile["BLOCK_M"]
        splits = max(cdiv(self.m, part), 1)
        return blocks * splits, splits, part

    def best(self) -> Tensor:
        """(n,) packed."""
        tile = shape("nearest", self.queries, self.keys)
        programs, splits, part = self.split(tile)
        best = self.keys.new_empty(splits, self.n, dtype=torch.int64)
        operands = *self.operands(), best, self.n, self.m, self.depth, part, *self.strides()
        launch(kernels.nearest_kernel, (programs,), *operands, **self.constants(tile))
        return best[0] if splits == 1 else best.amax(0)

    def best_of_many(self, k: int) -> Tensor:
        """(n, k) packed, best first."""
        if k > IN_REGISTERS:
            return self.best_of_panels(k)
        tile = shape("topk", self.queries, self.keys)
        programs, splits, part = self.split(tile)
        best = self.keys.new_empty(self.n, splits * k, dtype=torch.int64)
        operands = *self.operands(), best, self.n, self.m, self.depth, part, splits, k, *self.strides()
        launch(kernels.topk_kernel, (programs,), *operands, SLOTS=max(next_power_of_2(k), 2), **self.constants(tile))
        return best.topk(k).values

    def best_of_panels(self, k: int) -> Tensor:
        tile = shape("nearest", self.queries, self.keys)
        best = self.keys.new_empty(self.n, k, dtype=torch.int64)
        rows = panel_rows(self.n, self.m + k, 8, PANEL_BYTES, tile["BLOCK_N"])
        # what earlier keys have left stands in front of the next ones
        keys = min(self.m, max(PANEL_BYTES // (8 * rows) - k, k))
        panel = self.keys.new_empty(rows, k + keys, dtype=torch.int64)
        for first in range(0, self.n, rows):
            out = best[first : first + rows]
            for begin in range(0, self.m, keys):
                end = min(begin + keys, self.m)
                grid = (cdiv(len(out), tile["BLOCK_N"]) * cdiv(end - begin, tile["BLOCK_M"]),)
                operands = *self.operands(), panel[:, k:], self.n, self.m, self.depth, first, len(out), begin, end
                launch(kernels.panel_kernel, grid, *operands, k + keys, *self.strides(), **self.constants(tile))
                if begin:
                    panel[: len(out), :k] = out
                out.copy_(panel[: len(out), 0 if begin else k : k + end - begin].topk(k).values)
        return best

    def values(self, best: Tensor, metric: str) -> tuple[Tensor, Tensor]:
        """Of what was found, in its order."""
        values, indices = best.new_empty(best.shape, dtype=torch.float32), torch.empty_like(best)
        self._tell(best, metric, values, indices, None)
        return values, indices

    def distances(self, best: Tensor) -> Tensor:
        """The same packed anew by distance, nearest first."""
        again = torch.empty_like(best)
        self._tell(best, "l2", None, None, again)
        return again.sort(1, descending=True).values

    def _tell(self, best: Tensor, metric: str, *out: Tensor | None) -> None:
        tile, width = shape("neighbor_rows", self.queries, self.keys), best.shape[1] if best.ndim == 2 else 1
        operands = self.queries, self.keys, best, *out, best.numel(), width, self.m, self.depth, *self.strides()
        launch(kernels.values_kernel, (cdiv(best.numel(), tile["BLOCK_R"]),), *operands, METRIC=metric, **tile)


def nearest(queries, keys, metric, exclude_self):
    search = _Search(queries, keys, metric, exclude_self)
    return search.values(search.best(), metric)


def topk_similarity(queries, keys, k, metric, exclude_self):
    search = _Search(queries, keys, metric, exclude_self)
    best = search.best_of_many(k)
    return search.values(search.distances(best), "done") if metric == "l2" else search.values(best, metric)
