# SPDX-License-Identifier: Apache-2.0
"""The regression ops on a GPU; signatures are the schemas'. What bounds them: docs/gpu.md, "regression"."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.reference import _regression as reference
from sslkernels.triton._launch import cdiv, launch, shape
from sslkernels.triton._regression import (
    average_kernel,
    count_kernel,
    layer_norm_kernel,
    mean_kernel,
    regression_kernel,
)

WIDEST = 16384  # of a row that the registers of one program hold; beyond it the reference serves
SMALLEST = 1.2e-38  # float32 has no smaller divisor
TOGETHER = 4  # layers that one launch reads


def masked_regression(pred, target, index, loss, beta, normalize_target, eps, scale, mean, need_gradient):
    if pred.shape[-1] > WIDEST:
        return reference.forward(pred, target, index, loss, beta, normalize_target, eps, scale, mean, need_gradient)
    rows = _rows(pred)
    value = pred.new_empty((), dtype=torch.float32)
    dpred = pred.new_empty(pred.shape if need_gradient else (0,), dtype=torch.float32)
    counts, mask = None, _mask(index)
    if mean and mask is not None:
        tile = shape("regression_count", pred)
        counts = mask.new_empty(cdiv(rows, tile["SPAN"]), dtype=torch.int32)
        launch(count_kernel, counts.shape, mask, counts, rows, **tile)
    elif mean:
        scale = scale / rows if rows else scale * float("inf")
    programs = cdiv(rows, _row_tile(pred)["ROWS"])
    partials = pred.new_empty(programs, dtype=torch.float64)
    out = dpred if need_gradient else None
    _regress(pred, target, index, mask, loss, beta, normalize_target, eps, scale, None, counts, out, None, partials)
    length = 0 if counts is None else len(counts)
    launch(mean_kernel, (1,), value, partials, counts, programs, length, scale, **shape("regression_mean", pred))
    return value, dpred


def masked_regression_rows(pred, target, index, loss, beta, normalize_target, eps):
    if pred.shape[-1] > WIDEST:
        return reference.rows_forward(pred, target, index, loss, beta, normalize_target, eps)
    values = pred.new_empty(pred.shape[:-1], dtype=torch.float32)
    mask = _mask(index)
    _regress(pred, target, index, mask, loss, beta, normalize_target, eps, 1.0, None, None, None, values, None)
    return values


def masked_regression_rows_backward(grad, pred, target, index, loss, beta, normalize_target, eps):
    if pred.shape[-1] > WIDEST:
        return reference.rows_backward(grad, pred, target, index, loss, beta, normalize_target, eps)
    dpred = pred.new_empty(pred.shape)
    mask, grad = _mask(index), grad.contiguous()
    _regress(pred, target, index, mask, loss, beta, normalize_target, eps, 1.0, grad, None, dpred, None, None)
    return dpred


def average_layers(layers, instance_norm, layer_norm, eps):
    batch, rows, columns = layers[0].shape
    if layer_norm and columns > WIDEST:
        return reference.average_forward(layers, instance_norm, layer_norm, eps)
    out = torch.empty(layers[0].shape, dtype=torch.float32, device=layers[0].device)
    tile = shape("regression_layers", *layers)
    grid = batch, cdiv(columns, tile["BLOCK_C"])
    done = 0
    for _, alike in itertools.groupby(layers, key=lambda x: (x.dtype, x.stride())):
        group = list(alike)
        for begin in range(0, len(group), TOGETHER):
            some = group[begin : begin + TOGETHER]
            sizes = rows, columns, *some[0].stride(), eps, 1 / len(layers)
            xs = some + [None] * (TOGETHER - len(some))
            launch(average_kernel, grid, *xs, out, *sizes, FIRST=done == 0, STANDARD=instance_norm, **tile)
            done += len(some)
    if layer_norm:
        tile = _row_tile(out)
        launch(layer_norm_kernel, (cdiv(batch * rows, tile["ROWS"]),), out, batch * rows, columns, eps, **tile)
    return out


class _Layout(NamedTuple):
    """The rows of one or two tensors as three dimensions, which their strides tell apart."""

    sizes: tuple[int, int]  # of the last two
    strides: tuple[tuple[int, ...], ...]  # of each tensor, with that of its columns


def _layout(*xs: Tensor) -> tuple[tuple[Tensor, ...], _Layout]:
    """Copies where three dimensions do not do."""
    dims: list[tuple[int, list[int]]] = []
    for d in range(xs[0].ndim - 1):
        size, steps = xs[0].shape[d], [x.stride(d) for x in xs]
        if size == 1:
            continue
        if dims and all(before == size * step for before, step in zip(dims[-1][1], steps)):
            dims[-1] = dims[-1][0] * size, steps
        else:
            dims.append((size, steps))
    if len(dims) > 3:
        return _layout(*(x.contiguous() for x in xs))
    dims = [(1, [0] * len(xs))] * (3 - len(dims)) + dims
    strides = tuple((*(steps[i] for _, steps in dims), x.stride(-1)) for i, x in enumerate(xs))
    return xs, _Layout((dims[1][0], dims[2][0]), strides)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _mask(index: Tensor | None) -> Tensor | None:
    return index.contiguous() if index is not None and index.dtype == torch.bool else None


def _row_tile(x: Tensor) -> dict[str, int]:
    """Whole rows, as many as make a tile of some size."""
    tile = shape("regression_rows", x)
    block = 1 << (x.shape[-1] - 1).bit_length()
    warps = {"num_warps": max(4, min(16, block // 1024))} if "num_warps" in tile else {}
    return {"ROWS": max(1, tile["ELEMENTS"] // block), "BLOCK": block, **warps}


def _regress(
    pred, target, index, mask, loss, beta, normalize_target, eps, scale, grad, counts, dpred, values, partials
):
    width = pred.shape[-1]
    ids = index.contiguous() if index is not None and mask is None else None
    if ids is not None:
        (pred,), layout = _layout(pred)
    else:
        (pred, target), layout = _layout(pred, target)
    places = (0, 0, 0, 0)  # of a target that ids name
    if ids is not None:
        per_sample = ids.numel() // max(len(ids), 1)
        places = (target.shape[1], per_sample, *target.stride()[:2])
    target_strides = (0, 0, 0, target.stride(-1)) if ids is not None else layout.strides[1]
    rows = _rows(pred)
    if loss == "smooth_l1" and beta < SMALLEST:
        loss = "l1"
    tile = _row_tile(pred)
    launch(
        regression_kernel, (cdiv(rows, tile["ROWS"]),),
        pred, target, ids, mask, grad, counts, dpred, values, partials,
        rows, width, *layout.sizes, *layout.strides[0], *target_strides, *places,
        0 if counts is None else len(counts), beta, max(eps, SMALLEST), scale,
        LOSS=loss, NORMALIZE=normalize_target, **tile,
    )  # fmt: skip
