# SPDX-License-Identifier: Apache-2.0
"""How an op's autograd formula enters the dispatcher: `torch.library.register_autograd`, at a third of what it costs.

torch's own reads the schema once an argument and flattens every call as a tree; that is 35 us a call, and 70 us where
an argument is a list, beside 20 us for all the rest. Our ops have no default values and no nesting but `Tensor[]`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C


def register(library: torch.library.Library, op: Any, setup_context: Callable, backward: Callable) -> None:
    """Differentiate `op` by `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)`.

    In backward, a `Tensor[]` argument has a list in `ctx.needs_input_grad` and in what is returned. Gradients of unused
    outputs arrive as None, not as zeros.
    """
    lists = [i for i, argument in enumerate(op._schema.arguments) if isinstance(argument.type, _C.ListType)]
    lists = [i for i in lists if isinstance(op._schema.arguments[i].type.getElementType(), _C.TensorType)]

    def flat(args) -> list:
        out = list(args)
        for i in reversed(lists):
            out[i : i + 1] = args[i]
        return out

    def nested(args, counts) -> list:
        out = list(args)
        for i, count in zip(lists, counts):
            out[i : i + count] = [out[i : i + count]]
        return out

    def call(keyset, *args):
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args)

    def run(ctx, *args):
        keyset, ctx.counts = args[-2:]
        inputs = nested(args[:-2], ctx.counts)
        output = call(keyset, *inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return tuple(output) if isinstance(output, list) else output

    def differentiate(ctx, *grads):
        asked = ctx.needs_input_grad
        ctx.needs_input_grad = tuple(nested(asked[:-2], ctx.counts))
        try:
            grads = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = asked  # a retained graph comes here again
        return *flat(grads if isinstance(grads, tuple | list) else (grads,)), None, None

    # made by hand for its name, which an autograd graph shows
    name = op._schema.name.partition("::")[2]
    function: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
    )

    def differentiated(keyset, *args):
        if not (_C.is_grad_enabled() and _C._any_requires_grad(*args)):
            return call(keyset, *args)
        output = function.apply(*flat(args), keyset, [len(args[i]) for i in lists])
        return list(output) if isinstance(op._schema.returns[0].type, _C.ListType) else output

    library.impl(name, differentiated, "Autograd", with_keyset=True)
