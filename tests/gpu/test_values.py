# SPDX-License-Identifier: Apache-2.0
"""Values inside CUDA tensors: no access out of bounds, NaN without a wait, a ValueError under check_values()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sslkernels
from sslkernels import ops

pytestmark = pytest.mark.gpu
FAR = 2**40  # an address that no allocation reaches


def ids(bad: int, *shape: int) -> Tensor:
    """0, 1, 2, ... in each row, but for the second element of all; 1 changes nothing."""
    x = torch.arange(shape[-1]).repeat(*shape[:-1], 1)
    x.view(-1)[1] = bad
    return x.cuda()


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


BAD: dict[str, Callable[[int], Any]] = {
    "sampled_logsumexp": lambda bad: ops.sampled_logsumexp(floats(4, 8), floats(5, 8), ids(bad, 4, 3)),
    "gather_patches": lambda bad: ops.gather_patches(floats(2, 3, 32, 32), ids(bad, 2, 3), 16),
    "gather_tokens": lambda bad: ops.gather_tokens(floats(2, 6, 8), ids(bad, 2, 3)),
    "masked_patch_loss": lambda bad: ops.masked_patch_loss(floats(2, 3, 768), floats(2, 3, 32, 32), ids(bad, 2, 3), 16),
    "masked_regression": lambda bad: ops.masked_regression(floats(2, 3, 8), floats(2, 6, 8), ids(bad, 2, 3)),
    "linear_cross_entropy": lambda bad: ops.linear_cross_entropy(floats(4, 8), floats(9, 8), ids(bad, 4)),
    "skipgram": lambda bad: ops.skipgram(floats(5, 8), floats(6, 8), ids(bad, 4), ids(1, 4), ids(1, 4, 2)),
}


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [-1, 7000, FAR, -FAR])
@pytest.mark.parametrize("name", BAD)
def test_bad_ids_give_nan(name: str, bad: int, no_sync: None) -> None:
    BAD[name](1)
    BAD[name](bad)
    torch.cuda.synchronize()  # an illegal access would show here
    out = BAD[name](bad)
    assert out.isnan().any()


@pytest.mark.parametrize("name", BAD)
def test_bad_ids_are_refused_when_asked(name: str) -> None:
    BAD[name](1)
    with sslkernels.check_values(), pytest.raises(ValueError, match=r"-5|out of range|expected"):
        BAD[name](-5)
