# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of the logits of a linear layer with hard targets; `tokens.py` gathers the family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._autocast import cast_features
from sslkernels.ops._emitted import emitted_gradients, save_emitted, wants_grad
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _linear_cross_entropy as reference
from sslkernels.reference._precision import compute_dtype

__all__ = ["linear_cross_entropy"]

PANEL_BYTES = 8 << 20  # up to which logits are kept beside the gradients; the kernel's rule for more is by shape


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits that a linear layer makes, which are never stored whole.

        x_i    = linear_weight input_i + linear_bias                                            (V,)
        lse_i  = log sum_v exp(x_iv)
        loss_i = lse_i - (1 - label_smoothing) x_i,target_i - label_smoothing mean_v x_iv + z_loss lse_i^2
        sum = sum_i loss_i,  mean = sum / number of i,  over the i with target_i != ignore_index

    Names, order and defaults are those of `torch.nn.functional.linear_cross_entropy`. Rows that are ignored cost
    nothing: they meet no product, and are not read. For "mean" and "sum" the forward emits the gradients that somebody
    requires, so that backward() costs nothing where the loss is differentiated as it is; a loss that is scaled first
    costs a pass over them. The difference lse - x_target is formed as softplus(lse of the others - x_target), which
    keeps its digits where the model is sure.

    Args:
        input: hidden rows, (..., D). What `input.reshape(-1, D)` cannot view is copied.
        linear_weight: (V, D), of any strides: a tied embedding, the transpose of a (D, V) head.
        target: (...) int64, in [0, V) or `ignore_index`.
        linear_bias: (V,). -inf leaves a class out, as the padding of a vocabulary; not with label_smoothing, which
            asks for every class.
        reduction: "mean" (NaN, with gradients of zero, if every target is ignored, as torch), "sum", or "none":
            (...), 0 where the target is ignored. Its backward computes the logits again.
        ignore_index: any integer, also a class.
        label_smoothing: in [0, 1): the part of the target that is spread over all classes.
        z_loss: at least 0; 1e-4 in T5 and PaLM. It keeps lse near zero.

    Returns:
        float32, float64 if an input is. Under autocast input and linear_weight are cast, as F.linear does.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices other than above; on the CPU a target that is no class.

    Example:
        >>> hidden, weight = torch.randn(2, 8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> target = torch.full((2, 8), -100)
        >>> target[:, 3] = 7
        >>> linear_cross_entropy(hidden, weight, target).backward()

    Source: BERT `run_pretraining.py::get_masked_lm_output`; z-loss: Mesh TensorFlow, PaLM (arXiv:2204.02311) 5.
    """
    check.choice("reduction", reduction, ("mean", "sum", "none"))
    check.in_range("label_smoothing", label_smoothing, 0, 1)
    check.in_range("z_loss", z_loss, 0, float("inf"))
    _check_shapes(input, linear_weight, target, linear_bias)
    check.integer("ignore_index", ignore_index, -(1 << 63), (1 << 63) - 1)
    check.ids("target", target, linear_weight.shape[0], ignore=ignore_index)
    x, weight = cast_features(input.reshape(-1, input.shape[-1]), linear_weight)
    layer = (x, weight, linear_bias, target.reshape(-1))
    options = (ignore_index, float(label_smoothing), float(z_loss))
    if reduction == "none":
        return _rows(*layer, *options)[0].reshape(target.shape)
    return _loss(*layer, *options, reduction == "mean", PANEL_BYTES, wants_grad(*layer[:3]))[0]


def _check_shapes(input: Any, weight: Any, target: Any, bias: Any) -> None:
    check.floating("input", input)
    check.floating("linear_weight", weight)
    check.tensor("target", target)
    if input.ndim == 0 or input.shape[-1] == 0:
        raise ValueError(f"input must have shape (..., D) with D > 0, got {tuple(input.shape)}")
    if weight.ndim != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        expected = f"(V, {input.shape[-1]}) with V > 0"
        raise ValueError(f"linear_weight must have shape {expected}, got {tuple(weight.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(input.shape[:-1])}, got {tuple(target.shape)}")
    for name, x in (("linear_weight", weight), ("target", target)):
        check.same_device(name, x, "input", input)
    if bias is not None:
        check.vector("linear_bias", bias, weight.shape[0], input, check.FLOATS)


LAYER = "Tensor input, Tensor weight, Tensor? bias, Tensor target"
OPTIONS = "int ignore_index, float label_smoothing, float z_loss"


def _fake(input, weight, bias, target, *rest):  # type: ignore[no-untyped-def]
    dtype = _dtype(input, weight, bias)
    shapes = (x.shape if wanted else (0,) for x, wanted in zip((input, weight, bias), rest[-1]))
    return tuple(input.new_empty(shape, dtype=dtype) for shape in ((), *shapes))


def _fake_rows(input, weight, bias, target, *options):  # type: ignore[no-untyped-def]
    dtype = _dtype(input, weight, bias)
    return input.new_empty(target.shape, dtype=dtype), input.new_empty((3, *target.shape), dtype=dtype)


def _fake_backward(grad, input, weight, bias, target, stats, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else stats.new_empty(0)
        for x, wanted in zip((input, weight, bias), rest[-1])
    )


def _dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    return compute_dtype(input, weight, *(() if bias is None else (bias,)))


_loss = define(
    f"linear_cross_entropy({LAYER}, {OPTIONS}, bool mean, int panel_bytes, bool[3] output_mask)"
    " -> (Tensor loss, Tensor dinput, Tensor dweight, Tensor dbias)",
    reference=reference.forward,
    fake=_fake,
)
# stats: log-sum-exp, what its rounding lost, and the probability of all classes but the target's
_rows = define(
    f"linear_cross_entropy_rows({LAYER}, {OPTIONS}) -> (Tensor loss, Tensor stats)",
    reference=reference.rows_forward,
    fake=_fake_rows,
)
_rows_backward = define(
    f"linear_cross_entropy_rows_backward(Tensor grad, {LAYER}, Tensor stats, {OPTIONS}, bool[3] output_mask)"
    " -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    reference=reference.rows_backward,
    fake=_fake_backward,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    save_emitted(ctx, inputs[:3], inputs[-1], output[1:])


def _autograd(ctx: Any, grad: Any, *unused: Any) -> Any:
    return *emitted_gradients(ctx, grad), *(None,) * 7


def _setup_rows(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.options = inputs[4:]


def _autograd_rows(ctx: Any, grad: Any, unused: Any) -> Any:
    if grad is None:
        return (None,) * 7
    wanted = list(ctx.needs_input_grad[:3])
    grads = _rows_backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if w else None for g, w in zip(grads, wanted)), *(None,) * 4


differentiable(_loss, setup_context=_setup, backward=_autograd)
differentiable(_rows, setup_context=_setup_rows, backward=_autograd_rows)
once_differentiable(_rows_backward)
