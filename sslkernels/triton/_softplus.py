# SPDX-License-Identifier: Apache-2.0
"""Row sums of softplus over the scores, their weighted sum and all gradients; the sweep is in `_weights.py`."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch

from sslkernels.triton._scores import pairs
from sslkernels.triton._weights import gradients, row_sums


def similarity_softplus(q, k, scale_tensor, scale, bias_tensor, bias, *exclude):
    return row_sums(q, k, scale_tensor, scale, bias_tensor, bias, pairs(*exclude, n=q.shape[0], m=k.shape[0]))


def similarity_softplus_backward(grad, q, k, scale_tensor, scale, bias_tensor, bias, *rest):
    *exclude, mask = rest
    rules = pairs(*exclude, n=q.shape[0], m=k.shape[0])
    dtypes = q.dtype, k.dtype, grad.dtype, grad.dtype
    return gradients(q, k, grad, 1.0, None, scale_tensor, scale, bias_tensor, bias, rules, mask, dtypes)


def similarity_softplus_sum(q, k, weight, uniform_weight, scale_tensor, scale, bias_tensor, bias, *rest):
    *exclude, mask = rest
    rules = pairs(*exclude, n=q.shape[0], m=k.shape[0])
    loss = q.new_empty((), dtype=torch.float32)
    numbers = scale_tensor, scale, bias_tensor, bias
    dtypes = (torch.float32,) * 4
    return loss, *gradients(q, k, weight, uniform_weight, None, *numbers, rules, mask, dtypes, loss)
