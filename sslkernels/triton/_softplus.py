# SPDX-License-Identifier: Apache-2.0
"""Row sums of softplus over the scores, their weighted sum, and all gradients in one sweep.

A row's weight w_i is known before the sweep: with W_ij = w_i logistic(s_ij + bias), dq = scale W k and dk = scale W^T q
are products of a bounded panel of W, with the scores three GEMMs. The panel is written once and read twice: at
N = 32,768 and D = 768 in bfloat16, 6.4 GB or 2 ms beside 5 ms of GEMMs at an H100's 989 TFLOP/s. Softplus and its slope
take 2 operations of the special units and about 30 others an element: 2 ms, which a second block on the same
multiprocessor hides in part. Expected: 10 ms, where three bare GEMMs at 700 TFLOP/s take 7.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sslkernels.triton._launch import cdiv, launch, multiprocessors, shape
from sslkernels.triton._panel import PANEL_BYTES, add_product, panels, product
from sslkernels.triton._scores import chunked, leave_out, pairs, products, row_major, unbounded
from sslkernels.triton._sums import add_up, logistic, softplus
from sslkernels.triton._tiles import LOG2E, precision, scalar

LIFT = 32768.0  # an fp16 panel holds this times w_i f / max |w|: few weights then are below its normal numbers


@triton.jit
def _halves(tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of each tile, in order."""
    halves = ()
    for i in tl.static_range(len(tiles)):
        halves += tl.split(tl.permute(tl.reshape(tiles[i], (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    return halves


@triton.jit
def softplus_kernel(
    q, k, weight, panel, row_sums, loss, dscale, dbias, scale_tensor, scale, bias_tensor, bias, uniform,
    lift_tensor, lift, first, n, m, depth, base, chunk, chunks, weight_stride, q_row, q_column, k_row, k_column,
    diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Rows first to n, `chunk` tiles of columns a program; what is None is neither computed nor written."""
    i, part, begin, end = chunked(
        tl.program_id(0), tl.cdiv(n - first, BLOCK_N), tl.cdiv(m, BLOCK_M), chunks, chunk, GROUP
    )
    rows = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
    number = scalar(scale_tensor, scale)
    offset = scalar(bias_tensor, bias)
    if weight is not None:
        w = tl.load(weight + rows.to(tl.int64) * weight_stride, mask=rows < n, other=0.0).to(tl.float32)
    else:
        w = tl.where(rows < n, uniform, 0.0)
    if panel is not None:
        factor = w * number
        if panel.dtype.element_ty == tl.float16:
            factor = w * scalar(lift_tensor, lift)
    total = tl.zeros((BLOCK_N,), tl.float32)
    slopes = tl.zeros((BLOCK_N,), tl.float32)
    dots = tl.zeros((BLOCK_N,), tl.float32)
    WIDTH: tl.constexpr = BLOCK_M // 2**HALVINGS
    for block in range(begin, end):
        columns = block * BLOCK_M + tl.arange(0, BLOCK_M)
        x = products(
            q, k, rows, columns, n, m, depth, q_row, q_column, k_row, k_column,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN, PRECISION,
        )  # fmt: skip
        parts = (x,)
        for level in tl.static_range(HALVINGS):
            parts = _halves(parts, BLOCK_N, BLOCK_M // 2**level)
        # several numbers an element follow: of a part of the tile at a time they fit the registers
        for p in tl.static_range(len(parts)):
            columns = block * BLOCK_M + p * WIDTH + tl.arange(0, WIDTH)
            x = parts[p]
            s = leave_out(
                x * number + offset, rows, columns, n, m,
                diagonal, period, query_groups, key_groups, query_mask, key_mask, DIFFER,
            )  # fmt: skip
            e = tl.exp2(tl.abs(s) * -LOG2E)
            if row_sums is not None or loss is not None:
                total += tl.sum(softplus(s, e), 1)
            f = logistic(s, e)
            if dbias is not None:
                slopes += tl.sum(f, 1)
            if dscale is not None:
                dots += tl.sum(f * x, 1)
            if panel is not None:
                inside = (rows < n)[:, None] & (columns < m)[None, :]
                at = panel + (rows - first)[:, None].to(tl.int64) * m + columns[None, :]
                tl.store(at, (f * factor[:, None]).to(panel.dtype.element_ty), mask=inside)
    program = base + tl.program_id(0)
    if row_sums is not None:
        tl.store(row_sums + part.to(tl.int64) * n + rows, total, mask=rows < n)
    # a row outside has the last row's products
    if loss is not None:
        tl.store(loss + program, tl.sum(tl.where(rows < n, total * w, 0.0), 0))
    if dscale is not None:
        tl.store(dscale + program, tl.sum(tl.where(rows < n, dots * w, 0.0), 0))
    if dbias is not None:
        tl.store(dbias + program, tl.sum(tl.where(rows < n, slopes * w, 0.0), 0))


def _split(blocks, columns, x, waves):
    """Tiles of columns a program, and programs a row of tiles: enough programs for so many rounds of the chip."""
    parts = min(max(cdiv(waves * multiprocessors(x), max(blocks, 1)), 1), max(columns, 1))
    chunk = cdiv(columns, parts) if columns else 1
    return chunk, max(cdiv(columns, chunk), 1)


def _tiles(q, k, rules):
    tile, depth = shape("softplus", q, k), q.shape[1]
    even = depth > 0 and depth % tile["BLOCK_D"] == 0
    tile = unbounded(tile, q, k, rules.vectors() or not even)
    return tile | {"EVEN": even, "PRECISION": precision()}


def row_sums(q, k, scale_tensor, scale, bias_tensor, bias, rules):
    """sum_j softplus(s_ij + bias), (N,) float32."""
    q, k = row_major(q, k)
    (n, depth), m = q.shape, k.shape[0]
    tile = _tiles(q, k, rules)
    blocks, columns = cdiv(n, tile["BLOCK_N"]), cdiv(m, tile["BLOCK_M"])
    chunk, chunks = _split(blocks, columns, q, 4)
    out = q.new_empty(chunks, n, dtype=torch.float32)
    launch(
        softplus_kernel, (blocks * chunks,), q, k, None, None, out, None, None, None, scale_tensor, scale,
        bias_tensor, bias, 1.0, None, 1.0, 0, n, m, depth, 0, chunk, chunks, 0, *q.stride(), *k.stride(), *rules,
        **tile,
    )  # fmt: skip
    return out.sum(0) if chunks > 1 else out[0]


def gradients(
    q, k, weight, uniform, scale_tensor, scale, bias_tensor, bias, rules, mask, dtypes, loss=None
):  # fmt: skip
    """dq, dk, dscale, dbias of the sum of w_i row_i, in `dtypes`, and the sum into `loss` where that is given.

    `mask` says which gradients; the others are empty.
    """
    q, k = row_major(q, k)
    (n, depth), m = q.shape, k.shape[0]
    shapes = [shape if want else (0,) for shape, want in zip((q.shape, k.shape, (), ()), mask)]
    dq, dk, *numbers = (q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))
    numbers = [loss, *(x if want else None for x, want in zip(numbers, mask[2:]))]
    if n == 0 or m == 0 or (loss is None and not any(mask)):
        for x in (dq, dk, *numbers):
            if x is not None:
                x.zero_()
        return dq, dk, *(q.new_empty(0) if x is None else x for x in numbers[1:])
    tile = _tiles(q, k, rules)
    dtype = q.dtype if q.dtype == k.dtype else torch.float32
    spans = list(panels(n, m, dtype, PANEL_BYTES, tile["BLOCK_N"])) if mask[0] or mask[1] else [slice(0, n)]
    panel = q.new_empty(spans[0].stop, m, dtype=dtype) if mask[0] or mask[1] else None
    blocks = cdiv(spans[0].stop, tile["BLOCK_N"])
    chunk, chunks = _split(blocks, cdiv(m, tile["BLOCK_M"]), q, 16)
    programs = cdiv(blocks * chunks, 16) * 16  # a multiple, so that the kernel is not specialised on each
    partials = q.new_zeros(sum(x is not None for x in numbers), len(spans) * programs, dtype=torch.float32)
    into = iter(partials)
    places = [None if x is None else next(into) for x in numbers]
    lifted = dtype == torch.float16 and panel is not None
    lift = _lift(weight, uniform) if lifted else 1.0
    dq_, dk_ = (x.new_empty(x.shape, dtype=torch.float32) if lifted else x for x in (dq, dk))
    if dk.dtype != torch.float32 and len(spans) > 1:
        dk_ = dk.new_empty(dk.shape, dtype=torch.float32)
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    for i, span in enumerate(spans):
        grid = (cdiv(span.stop - span.start, tile["BLOCK_N"]) * chunks,)
        launch(
            softplus_kernel, grid, q, k, weight, panel, None, *places, scale_tensor, scale, bias_tensor, bias,
            uniform, *_scalar(lift), span.start, span.stop, m, depth, i * programs, chunk, chunks,
            *(weight.stride() if weight is not None else (0,)), *q.stride(), *k.stride(), *rules, **tile,
        )  # fmt: skip
        if panel is None:
            continue
        w = panel[: span.stop - span.start]
        if mask[0]:
            product(w, wide_k, out=dq_[span])
        if mask[1]:
            add_product(dk_, w.T, wide_q[span], first=i == 0)
    for wanted, wide, out in ((mask[0], dq_, dq), (mask[1], dk_, dk)):
        if wanted and wide is not out:
            out.copy_(wide.mul_(scale if scale_tensor is None else scale_tensor).div_(lift) if lifted else wide)
    if partials.shape[0]:
        add_up(partials, *(x for x in numbers if x is not None))
    return dq, dk, *(q.new_empty(0, dtype=torch.float32) if x is None else x for x in numbers[1:])


def _lift(weight, uniform):
    """What a weight w f in (0, max |w|] is multiplied by, so that fp16 has normal numbers for it."""
    if weight is None:
        return LIFT / (abs(uniform) or 1.0)
    top = torch.nan_to_num(weight.abs(), 0.0, 0.0).amax()
    return LIFT / torch.where(top == 0, 1.0, top)


def _scalar(x):
    return (x, 1.0) if isinstance(x, torch.Tensor) else (None, x)


def similarity_softplus(q, k, scale_tensor, scale, bias_tensor, bias, *exclude):
    return row_sums(q, k, scale_tensor, scale, bias_tensor, bias, pairs(*exclude, n=q.shape[0], m=k.shape[0]))


def similarity_softplus_backward(grad, q, k, scale_tensor, scale, bias_tensor, bias, *rest):
    *exclude, mask = rest
    rules = pairs(*exclude, n=q.shape[0], m=k.shape[0])
    dtypes = q.dtype, k.dtype, grad.dtype, grad.dtype
    return gradients(q, k, grad, 1.0, scale_tensor, scale, bias_tensor, bias, rules, mask, dtypes)


def similarity_softplus_sum(q, k, weight, uniform_weight, scale_tensor, scale, bias_tensor, bias, *rest):
    *exclude, mask = rest
    rules = pairs(*exclude, n=q.shape[0], m=k.shape[0])
    loss = q.new_empty((), dtype=torch.float32)
    numbers = scale_tensor, scale, bias_tensor, bias
    dtypes = (torch.float32,) * 4
    return loss, *gradients(q, k, weight, uniform_weight, *numbers, rules, mask, dtypes, loss)
