# SPDX-License-Identifier: Apache-2.0
"""A bounded panel of rows of a matrix that is never stored whole, and its products with float32 results.

for rows in panels(n, m, dtype):      # slices of the n rows: even, as few as fit the bytes
    a kernel writes w = panel[: rows.stop - rows.start]
    product(w, k, out=dq[rows])
    add_product(dk, w.T, q[rows], first=rows.start == 0)

The products are torch's own (cuBLAS), one after the other on one stream: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sslkernels.triton._launch import cdiv

PANEL_BYTES = 512 << 20
TILE = 128  # rows of the largest tile: a panel of whole tiles wastes none


def panel_rows(rows: int, columns: int, itemsize: int, limit: int = PANEL_BYTES, tile: int = TILE) -> int:
    """Rows of a panel: what fits `limit` bytes in whole tiles, at least one; panels as even as tiles allow; >= 1."""
    fit = max(limit // max(columns * itemsize, 1) // tile, 1) * tile
    even = cdiv(rows, max(cdiv(rows, fit), 1))
    return max(min(cdiv(even, tile) * tile, rows), 1)


def panels(rows: int, columns: int, dtype: torch.dtype, limit: int = PANEL_BYTES, tile: int = TILE) -> Iterator[slice]:
    """The rows of each panel, in order."""
    step = panel_rows(rows, columns, dtype.itemsize, limit, tile)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, in its dtype; operands of one dtype are multiplied as they are, others as float32 copies."""
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32:
        add_product(out, a, b, first=True)
    else:
        out.copy_(a.float() @ b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a b in float32, or total = a b, of any dtype, where it is the first: it need not be initialised."""
    if first and total.dtype != torch.float32:
        product(a, b, total)
    elif _narrow(a, b):
        # `total` as input and as output: torch >= 2.10 takes a float32 addend beside 16-bit factors
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif first:
        torch.mm(a.float(), b.float(), out=total)
    else:
        total.addmm_(a.float(), b.float())


def _narrow(a: Tensor, b: Tensor) -> bool:
    # ROCm's and the CPU's mm have no float32 result of 16-bit factors
    return a.dtype == b.dtype != torch.float32 and a.device.type == "cuda" and torch.version.hip is None
