# SPDX-License-Identifier: Apache-2.0
"""Launches of the contrastive kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sslkernels.triton import contrastive

TENSOR_CORES = {"attention_kernel", "gradient_kernel", "lse_weights_kernel", "softplus_kernel", "sweep_kernel"}
SPILLS: dict[str, int] = {
    # features of two dtypes on gfx942: the converted tiles are kept beside the others
    "gradient_kernel": 64,
    # two blocks on a multiprocessor, so that one's arithmetic hides behind the other's products, leave 128 registers
    "softplus_kernel": 32,
    # rows that are not read 16 bytes at a time on sm_100: they come by way of registers
    "sweep_kernel": 32,
}


def _normalize(dtype: torch.dtype) -> None:
    x = torch.empty(512, 384, dtype=dtype, device="meta")
    z, norm = contrastive.l2_normalize([x, x], 1e-12)
    contrastive.l2_normalize_backward(torch.empty_like(z), z, norm, 1e-12)


NOTHING = (None, None, None, None, None, False)
DIAGONAL = (0, *NOTHING[1:])


def _features(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _clip(n: int, d: int) -> Callable[[torch.dtype], None]:
    """Rows and columns, the diagonal left out, a learnable scale."""

    def launch(dtype: torch.dtype) -> None:
        width = d if dtype != torch.float32 or d > 128 else 64  # what fits registers
        q, k, scale = _features(n, width, dtype), _features(n, width, dtype), torch.empty((), device="meta")
        options = q, k, scale, 1.0, *DIAGONAL, (1.0,)
        row, col, positive, *_ = contrastive.similarity_logsumexp(*options, True, False, 0)
        saved = row, col, row.new_empty(0), (True, True, True)
        contrastive.similarity_logsumexp_backward(row, col, positive, *options, 0, *saved)

    return launch


def _groups_of_rows(dtype: torch.dtype) -> None:
    """More rows and columns than partial results of all at once have memory for."""
    if dtype != torch.bfloat16:
        return
    q = _features(1 << 18, 512, dtype)
    contrastive.similarity_logsumexp(q, q, None, 10.0, *NOTHING, (1.0,), True, False, None)
    contrastive.self_similarity_logsumexp(q, None, 10.0, 0, 1 << 17, None, None, False, (1.0,), False, 1 << 17)


def _labels(rows: int) -> torch.Tensor:
    return torch.empty(rows, dtype=torch.int64, device="meta")


def _supcon(dtype: torch.dtype) -> None:
    """Labels on both sides and a mask, features beyond the registers."""
    if dtype == torch.float16:  # as bfloat16
        return
    z, mask = _features(4_096, 512, dtype), torch.empty(4_096, dtype=torch.bool, device="meta")
    options = z, None, 10.0, 0, None, _labels(4_096), mask, True, (1.0,)
    lse, *_ = contrastive.self_similarity_logsumexp(*options, False, None)
    contrastive.self_similarity_logsumexp_backward(lse, None, *options, None, lse, lse.new_empty(0), (True, False))


def _several_scales(dtype: torch.dtype) -> None:
    if dtype == torch.float16:  # as bfloat16
        return
    q, k = _features(4_096, 128, dtype), _features(4_096, 128, dtype)
    options = q, k, None, 10.0, *DIAGONAL, (1.0, 0.5, 2.0)
    row, col, *_ = contrastive.similarity_logsumexp(*options, True, False, None)
    saved = row, col, row.new_empty(0), (True, True, False)
    contrastive.similarity_logsumexp_backward(row, col, None, *options, None, *saved)


def _uneven(dtype: torch.dtype) -> None:
    """Features that fill no tile, of one dtype and mixed."""
    if dtype == torch.float16:  # as bfloat16
        return
    pairs = [(_features(4_096, 515, dtype), _features(4_096, 515, dtype))]
    if dtype == torch.float32:  # which the mixed ones are multiplied in
        pairs.append((_features(4_096, 64, torch.bfloat16), _features(4_096, 64, dtype)))
    for q, k in pairs:
        options = q, k, None, 10.0, *DIAGONAL, (1.0,)
        row, col, *_ = contrastive.similarity_logsumexp(*options, True, False, None)
        saved = row, col, row.new_empty(0), (True, True, False)
        contrastive.similarity_logsumexp_backward(row, col, None, *options, None, *saved)
    q = _features(4_096, 765, dtype)
    contrastive.similarity_softplus_sum(q, q, None, 1 / 4_096, _number(), 1.0, _number(), 1.0, *DIAGONAL, [True] * 4)


def _nt_xent(dtype: torch.dtype) -> None:
    if dtype == torch.float16:  # as bfloat16
        return
    z = _features(16_384, 128, dtype)
    options = z, None, 10.0, 0, 8_192, None, None, False, (1.0,)
    lse, positive, *_ = contrastive.self_similarity_logsumexp(*options, False, 8_192)
    contrastive.self_similarity_logsumexp_backward(lse, positive, *options, 8_192, lse, lse.new_empty(0), (True, False))


def _queue(d: int) -> Callable[[torch.dtype], None]:
    """MoCo's: few queries, many frozen keys; wide ones by the kernels of CLIP, which the other dtypes have compiled."""

    def launch(dtype: torch.dtype) -> None:
        if d > 128 and dtype != torch.bfloat16:
            return
        width = d if dtype != torch.float32 or d > 128 else 64
        q, k = _features(256, width, dtype), _features(65_536, width, dtype)
        contrastive.similarity_row_attention(q, k, None, 10.0, *NOTHING)

    return launch


def _number() -> torch.Tensor:
    return torch.empty((), device="meta")


def _sampled(dtype: torch.dtype) -> None:
    """wav2vec 2.0's distractors, or a query's own negatives."""
    if dtype == torch.float16:  # compiles to what bfloat16 does
        return
    q, k = (torch.empty(n, 256, dtype=dtype, device="meta") for n in (8192, 16384))
    indices = torch.empty(8192, 100, dtype=torch.int64, device="meta")
    lse = contrastive.sampled_logsumexp(q, k, indices, None, _number(), 1.0)
    numbers = None, _number(), 1.0
    contrastive.sampled_logsumexp_backward(lse, q, k, indices, *numbers, lse, [True] * 3)


def _distractors(dtype: torch.dtype) -> None:
    lengths = torch.empty(32, dtype=torch.int64, device="meta")
    contrastive.distractor_counts(torch.empty(1, dtype=torch.int64, device="meta"), lengths, 500, 100)


def _siglip(dtype: torch.dtype) -> None:
    q, k = torch.empty(2, 32768, 768, dtype=dtype, device="meta")
    numbers = _number(), 1.0, _number(), 1.0, *DIAGONAL
    contrastive.similarity_softplus_sum(q, k, None, 1 / 32768, *numbers, [True] * 4)


def _softplus_rows(dtype: torch.dtype) -> None:
    q, k = torch.empty(2, 32768, 768, dtype=dtype, device="meta")
    numbers = _number(), 1.0, _number(), 1.0, *DIAGONAL
    contrastive.similarity_softplus(q, k, *numbers)
    grad = torch.empty(32768, device="meta")
    contrastive.similarity_softplus_backward(grad, q, k, *numbers, [True] * 4)


def _cross_entropy(n: int, d: int) -> Callable[[torch.dtype], None]:
    """Keys with a gradient, and without."""

    def launch(dtype: torch.dtype) -> None:
        if dtype == torch.float16:  # compiles to what bfloat16 does
            return
        q, k, positive = _features(n, d, dtype), _features(n, d, dtype), torch.empty(n, device="meta")
        losses = positive, None, 1 / n, _number(), 1.0, *DIAGONAL, False
        contrastive.similarity_cross_entropy(q, k, *losses, [True] * 4)
        contrastive.similarity_cross_entropy(q, k, *losses, [True, False, True, True])

    return launch


def _two_view(dtype: torch.dtype) -> None:
    out = _features(1024, 256, dtype)  # the widest rows that one program keeps
    contrastive.two_view_cross_entropy(out, out, None, 0.5 / 1024, _number(), 1.0, False, [True] * 3)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "l2_normalize": _normalize,
    "clip": _clip(32_768, 512),
    "clip_narrow": _clip(4_096, 128),
    "groups_of_rows": _groups_of_rows,
    "nt_xent": _nt_xent,
    "supcon": _supcon,
    "several_scales": _several_scales,
    "uneven": _uneven,
    "queue": _queue(128),
    "queue_wide": _queue(1_024),
    "sampled_logsumexp": _sampled,
    "distractor_counts": _distractors,
    "similarity_softplus_sum": _siglip,
    "similarity_softplus": _softplus_rows,
    "similarity_cross_entropy": _cross_entropy(4_096, 128),
    "two_view_cross_entropy": _two_view,
}
