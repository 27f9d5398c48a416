# SPDX-License-Identifier: Apache-2.0
"""Launches of the tokens' kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sslkernels.triton import tokens

TENSOR_CORES = {"logits_kernel", "input_kernel", "layer_kernel"}
SPILLS: dict[str, int] = {}
ALL = [True, True, True]


def _operands(dtype: torch.dtype, n: int, d: int, v: int, bias: bool) -> tuple:
    x, weight, b = (torch.empty(size, dtype=dtype, device="meta") for size in ((n, d), (v, d), (v,)))
    return x, weight, b if bias else None, torch.empty(n, dtype=torch.int64, device="meta")


def _causal(dtype: torch.dtype) -> None:
    tokens.linear_cross_entropy(
        *_operands(dtype, 8192, 1024, 32000, False), -100, 0.0, 0.0, True, 8 << 20, [True, True, False]
    )


def _masked(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        return  # compiled as bfloat16 is
    operands = _operands(dtype, 2048, 768, 30522, True)
    tokens.linear_cross_entropy(*operands, -100, 0.1, 1e-4, True, 8 << 20, ALL)
    _, stats = tokens.linear_cross_entropy_rows(*operands, -100, 0.1, 1e-4)
    grad = torch.empty(2048, device="meta")
    tokens.linear_cross_entropy_rows_backward(grad, *operands, stats, -100, 0.1, 1e-4, ALL)


def _skipgram(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        return
    tables = [torch.empty(100_000, 100, dtype=dtype, device="meta") for _ in range(2)]
    ids = [torch.empty(size, dtype=torch.int64, device="meta") for size in ((65536,), (65536,), (65536, 5))]
    loss, slopes = tokens.skipgram(*tables, *ids, "sum", False)
    tokens.skipgram_backward(loss, slopes, *tables, *ids, [True, True])
    tokens.skipgram_backward_rows(loss, slopes, *tables, *ids, [True, True])


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "linear_cross_entropy, causal": _causal,
    "linear_cross_entropy, masked": _masked,
    "skipgram": _skipgram,
}
