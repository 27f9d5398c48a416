# SPDX-License-Identifier: Apache-2.0
"""Gradients that the forward emits, since it knows the weights already: the backward is a multiplication."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops._registry import define, once_differentiable


def _reference(grad: Tensor, emitted: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [
        (grad * e).to(x.dtype).reshape(x.shape) if x.ndim == 0 else _scale(grad, e, x) for e, x in zip(emitted, inputs)
    ]


def _scale(grad: Tensor, emitted: Tensor, x: Tensor) -> Tensor:
    # in one pass, which rounds what it writes; grad with one dimension makes the arithmetic float32 at least, where a
    # number without dimensions would be rounded to 16 bits
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.mul(emitted.reshape(x.shape), grad.reshape(1), out=out)


# upstream scalar times what the forward emitted, in the dtype of the inputs
scale_emitted = define(
    "emitted_gradients(Tensor grad, Tensor[] emitted, Tensor[] inputs) -> Tensor[]",
    reference=_reference,
    fake=lambda grad, emitted, inputs: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs],
    everywhere=True,
)
once_differentiable(scale_emitted)


def wants_grad(*xs: Any) -> list[bool]:
    """Which of these, tensors or not, need a gradient here."""
    return [isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() for x in xs]


def save_emitted(ctx, inputs, wanted, emitted) -> None:
    """Only what needs a gradient is saved: frozen keys may be overwritten before backward."""
    ctx.wanted = wanted
    ctx.save_for_backward(*(x for x, w in zip(inputs, wanted) if w), *(e for e, w in zip(emitted, wanted) if w))


def emitted_gradients(ctx, grad) -> list[Tensor | None]:
    """The gradient of each input that `save_emitted` was given, None where it was not wanted."""
    count = sum(ctx.wanted)
    if grad is None or not count:
        return [None] * len(ctx.wanted)
    saved = list(ctx.saved_tensors)
    scaled = iter(scaled_by(grad, saved[count:], saved[:count]))
    return [next(scaled) if w else None for w in ctx.wanted]


def scaled_by(grad: Tensor, emitted: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """grad times each of `emitted`, in the dtype of its input."""
    if not (is_one(grad) and all(e.dtype == x.dtype and e.shape == x.shape for e, x in zip(emitted, inputs))):
        emitted = scale_emitted(grad, emitted, inputs)
    return emitted


def is_one(grad: Tensor) -> bool:
    """Whether the gradients are asked for as they are, as loss.backward() does: on the CPU that can be seen, and saves
    a pass over them."""
    return not torch.is_grad_enabled() and grad.device.type == "cpu" and check.readable(grad) and bool(grad == 1)
