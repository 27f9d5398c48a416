# SPDX-License-Identifier: Apache-2.0
"""How an op enters torch's dispatcher: one schema, its reference, its fake kernel, its autograd formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sslkernels import _library
from sslkernels.ops import _autograd

LIBRARY = torch.library.Library("sslkernels", "DEF")
OPS: list[str] = []
EVERYWHERE: list[str] = []


def define(schema: str, *, reference: Callable, fake: Callable | None, everywhere: bool = False) -> Any:
    """Define `sslkernels::<schema>` and return its overload.

    The reference serves every device that has no kernel of its own; a compiled library that registers the op under
    `CPU` or `CUDA` takes precedence through torch's dispatcher. `fake` is None only for an op that returns nothing.
    `everywhere` marks an op whose plain PyTorch is already the best there is: it never announces a fallback.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(reference)
    def announced(*args: Any) -> Any:
        _library.warn_fallback(name, args)
        return reference(*args)

    LIBRARY.impl(name, reference if everywhere else announced, "CompositeExplicitAutograd")
    if everywhere:
        EVERYWHERE.append(name)
    torch.library.register_fake(f"sslkernels::{name}", fake or (lambda *args: None), lib=LIBRARY)
    OPS.append(name)
    return getattr(torch.ops.sslkernels, name).default


def differentiable(op: Any, *, setup_context: Callable, backward: Callable) -> None:
    """Give `op` its autograd formula; gradients of unused outputs arrive as None, not as zeros."""
    _autograd.register(LIBRARY, op, setup_context, backward)


def once_differentiable(op: Any) -> None:
    """Make a second differentiation through the backward `op` an error instead of a silently missing term."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op.name()}: double backward is not supported; use sslkernels.reference")

    _autograd.register(LIBRARY, op, lambda ctx, inputs, output: None, refuse)
