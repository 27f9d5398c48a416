# SPDX-License-Identifier: Apache-2.0
"""Skip-gram with negative sampling, differentiable: gather, dot, log-sigmoid, and dense or sparse gradients."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _skipgram as reference
from sslkernels.reference._precision import compute_dtype

_PAIRS = "Tensor input_weight, Tensor output_weight, Tensor inputs, Tensor outputs, Tensor negatives"
_GRADIENTS = f"(Tensor grad, Tensor slopes, {_PAIRS}, bool[2] output_mask) -> (Tensor dinput, Tensor doutput)"


def _fake(input_weight, output_weight, inputs, outputs, negatives, reduction, sparse):
    dtype = compute_dtype(input_weight, output_weight)
    loss = input_weight.new_empty(inputs.shape if reduction == "none" else (), dtype=dtype)
    return loss, input_weight.new_empty((negatives.shape[0], 1 + negatives.shape[1]), dtype=dtype)


def _backward_fake(grad, slopes, input_weight, output_weight, inputs, outputs, negatives, mask):
    return tuple(w.new_empty(w.shape if m else 0) for w, m in zip((input_weight, output_weight), mask))


def _rows_fake(grad, slopes, input_weight, output_weight, inputs, outputs, negatives, mask):
    rows = slopes.shape[0], slopes.shape[0] * slopes.shape[1]
    weights = input_weight, output_weight
    return tuple(w.new_empty((n, w.shape[1]) if m else 0) for w, n, m in zip(weights, rows, mask))


# the slopes of the reduced loss along each score are all that the backward needs besides the tables
loss = define(
    f"skipgram({_PAIRS}, str reduction, bool sparse) -> (Tensor loss, Tensor slopes)",
    reference=reference.forward,
    fake=_fake,
)
backward = define(f"skipgram_backward{_GRADIENTS}", reference=reference.backward, fake=_backward_fake)
# for sparse gradients: what each pair adds, row by row
backward_rows = define(f"skipgram_backward_rows{_GRADIENTS}", reference=reference.backward_rows, fake=_rows_fake)


def _setup(ctx, inputs, output) -> None:
    *tensors, _, ctx.sparse = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _sparse(weight, index, values):
    return torch.sparse_coo_tensor(index[None], values, weight.shape, check_invariants=False)


def _autograd(ctx, grad, unused):
    if grad is None:
        return (None,) * 7
    slopes, input_weight, output_weight, inputs, outputs, negatives = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    operands = (grad, slopes, input_weight, output_weight, inputs, outputs, negatives, mask)
    if not ctx.sparse:
        dinput, doutput = backward(*operands)
    else:
        dinput, doutput = backward_rows(*operands)
        dinput = _sparse(input_weight, inputs, dinput) if mask[0] else dinput
        rows = torch.cat((outputs[:, None], negatives), 1).flatten()
        doutput = _sparse(output_weight, rows, doutput) if mask[1] else doutput
    return dinput if mask[0] else None, doutput if mask[1] else None, *(None,) * 5


differentiable(loss, setup_context=_setup, backward=_autograd)
once_differentiable(backward)
once_differentiable(backward_rows)


def skipgram(
    input_weight: Tensor,
    output_weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    negatives: Tensor,
    *,
    reduction: str = "sum",
    sparse: bool = False,
) -> Tensor:
    """Skip-gram loss with negative sampling; neither the (B, K, D) gather nor the scores' graph is stored.

        u, v, n_k = input_weight[inputs_b], output_weight[outputs_b], output_weight[negatives_bk]
        loss_b    = softplus(-<u, v>) + sum_k [negatives_bk != outputs_b] softplus(<u, n_k>)

    A negative that is the positive is skipped, not drawn again, as in the original. The original sums its gradients
    over the pairs, so "sum" matches its step size.

    Args:
        input_weight, output_weight: (V, D) and (W, D), of any floating dtypes. word2vec's input is the context word,
            its output the centre word.
        inputs, outputs: (B,) int64 in [0, V) and [0, W).
        negatives: (B, K) int64 in [0, W); K may be 0. `alias_table(...).sample` draws them.
        reduction: "sum", "mean" over the pairs (NaN if there is none) or "none": (B,).
        sparse: gradients as COO tensors of B and B (1+K) rows, not coalesced, as F.embedding's; not under
            torch.compile.

    Returns:
        float32, float64 if a table is; not cast under autocast. Gradients are bit-identical at every thread count.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; an id outside its table on the CPU
            (compiled: RuntimeError) or under `check_values`, which otherwise makes its pair NaN.

    Example:
        >>> u, v = (torch.randn(100, 16, requires_grad=True) for _ in range(2))
        >>> skipgram(u, v, torch.randint(100, (8,)), torch.randint(100, (8,)), torch.randint(100, (8, 5))).backward()

    Source: Mikolov et al. 2013 (arXiv:1310.4546), equation 4; tmikolov/word2vec `word2vec.c`.
    """
    check.choice("reduction", reduction, ("sum", "mean", "none"))
    check.features(input_weight=input_weight, output_weight=output_weight)
    for name, ids, ndim in (("inputs", inputs, 1), ("outputs", outputs, 1), ("negatives", negatives, 2)):
        _check_ids(name, ids, ndim, inputs, input_weight if name == "inputs" else output_weight)
    return loss(input_weight, output_weight, inputs, outputs, negatives, reduction, sparse)[0]


def _check_ids(name: str, ids: Any, ndim: int, inputs: Tensor, weight: Tensor) -> None:
    check.tensor(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be torch.int64, got {ids.dtype}")
    if ids.ndim != ndim or ids.shape[0] != inputs.shape[0]:
        expected = "(B,)" if name == "inputs" else f"({inputs.shape[0]}, K)" if ndim == 2 else f"({inputs.shape[0]},)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(ids.shape)}")
    check.same_device(name, ids, "input_weight", weight)
    check.ids(name, ids, weight.shape[0])
