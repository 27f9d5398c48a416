# SPDX-License-Identifier: Apache-2.0
"""Every loss there is spans ranks, and says what it promises."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from torch import nn

from sslkernels import losses

PROMISE = "Over several ranks the mean of their losses, and DDP's average of their gradients, are those of one process."
NO_LOSS = {
    "clamp_logit_scale_": "changes a parameter, which is the same on all ranks",
    "mises_fisher_weights": "weighs what `dcl` hands it, and is told of other ranks by it",
    "MemoryQueue": "keeps keys",
}
NAMES = [name for name in losses.__all__ if name not in NO_LOSS]


def _is_module(name: str) -> bool:
    return inspect.isclass(getattr(losses, name))


def _text(x: object) -> str:
    return re.sub(r"\s+", " ", inspect.getdoc(x) or "")


def _stated(loss: Any) -> str:
    """What a function says; of a module also what the function says that it is said to be, or its base class."""
    if not inspect.isclass(loss):
        return _text(loss)
    own = " ".join(_text(kind) for kind in loss.__mro__ if kind.__name__ in losses.__all__)
    return " ".join([own, *(_text(getattr(losses, name)) for name in re.findall(r"`(\w+)` (?:as a module|with)", own))])


@pytest.mark.parametrize("name", NAMES)
def test_takes_a_process_group_and_promises(name):
    loss = getattr(losses, name)
    parameter = inspect.signature(loss).parameters["process_group"]
    assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is None
    assert PROMISE in _stated(loss)


@pytest.mark.parametrize("name", [name for name in NAMES if not _is_module(name)])
def test_tells_the_other_ranks_of_an_error(name):
    assert hasattr(getattr(losses, name), "__wrapped__"), "distributed.raises_together is missing"


@pytest.mark.parametrize("name", [name for name in NAMES if _is_module(name)])
def test_module_shows_its_group_and_no_group(name):
    arguments = {"CPCLoss": (4, 6), "DINOLoss": (8,), "IBOTPatchLoss": (8,)}.get(name, ())
    alone, world = getattr(losses, name)(*arguments), getattr(losses, name)(*arguments, process_group="world")
    assert isinstance(alone, nn.Module)
    assert "process_group" not in repr(alone) and "process_group=world" in repr(world)
