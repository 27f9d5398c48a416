# SPDX-License-Identifier: Apache-2.0
"""What losses that are sums share: softplus with its slope, and the last step of a sum in a fixed order."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sslkernels.triton._launch import launch, shape
from sslkernels.triton._tiles import LOG2E


@triton.jit
def softplus(x, e):
    """log(1 + exp(x)), given e = exp(-|x|): exact to 3 ulp for any x; log(1 + e) / e is a polynomial."""
    p = 0.005232104565948248 * e - 0.029502876102924347
    p = p * e + 0.07822210341691971
    p = p * e - 0.13662919402122498
    p = p * e + 0.19105853140354156
    p = p * e - 0.24842943251132965
    p = p * e + 0.33319091796875
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def logistic(x, e):
    """1 / (1 + exp(-x)), given e = exp(-|x|)."""
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def margin_loss(margin, w, DECOUPLED: tl.constexpr):
    """w softplus(margin), or w margin where decoupled, and its derivative."""
    if DECOUPLED:
        return w * margin, w + tl.zeros_like(margin)
    e = tl.exp2(tl.abs(margin) * -LOG2E)
    return w * softplus(margin, e), w * logistic(margin, e)


@triton.jit
def vector_sum(x, count, BLOCK: tl.constexpr):
    """The sum of a vector, in an order that depends on BLOCK alone."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def add_up_kernel(partials, out0, out1, out2, count, BLOCK: tl.constexpr):
    """A program a row of partials."""
    row = tl.program_id(0)
    total = vector_sum(partials + row.to(tl.int64) * count, count, BLOCK)
    tl.store(out0, total, mask=row == 0)
    if out1 is not None:
        tl.store(out1, total, mask=row == 1)
    if out2 is not None:
        tl.store(out2, total, mask=row == 2)


def add_up(partials, *outputs):
    """Write the sum of each row of partials, (rows, P) float32, to a scalar tensor: one launch for all."""
    three = *outputs, *(None,) * (3 - len(outputs))
    launch(add_up_kernel, (len(outputs),), partials, *three, partials.shape[1], **shape("row", partials))
