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


BAD: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "sampled_logsumexp": lambda x: ops.sampled_logsumexp(floats(4, 8), floats(5, 8), x(4, 3)),
    "gather_patches": lambda x: ops.gather_patches(floats(2, 3, 32, 32), x(2, 3), 16),
    "embed_patches": lambda x: ops.embed_patches(floats(2, 3, 32, 32), x(2, 3), floats(8, 3, 16, 16)),
    "gather_tokens": lambda x: ops.gather_tokens(floats(2, 6, 8), x(2, 3)),
    "restore_tokens": lambda x: ops.restore_tokens(floats(2, 3, 8), x(2, 3), floats(1, 1, 8), length=6),
    "permute_patches": lambda x: ops.permute_patches(floats(2, 3, 32, 32), x(2, 4), 16),
    "masked_patch_loss": lambda x: ops.masked_patch_loss(floats(2, 3, 768), floats(2, 3, 32, 32), x(2, 3), 16),
    "masked_regression": lambda x: ops.masked_regression(floats(2, 3, 8), floats(2, 6, 8), x(2, 3)),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(floats(4, 8), floats(9, 8), x(4)),
    "skipgram": lambda x: ops.skipgram(floats(5, 8), floats(6, 8), x(4), x(4).clamp(0, 4), x(4, 2).clamp(0, 4)),
}


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def made(name: str, bad: int) -> Callable[[], Any]:
    """The call, its ids made before: to make them waits for the device."""
    kept: dict[tuple[int, ...], Tensor] = {}
    return lambda: BAD[name](lambda *shape: kept.setdefault(shape, ids(bad, *shape)))


@pytest.mark.parametrize("bad", [-1, 7000, FAR, -FAR])
@pytest.mark.parametrize("name", BAD)
def test_bad_ids_give_nan(name: str, bad: int, no_sync: None) -> None:
    made(name, 1)()
    call = made(name, bad)
    assert call().isnan().any()  # an illegal access would show here
    torch.cuda.set_sync_debug_mode("error")
    out = call()
    torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().any()


@pytest.mark.parametrize("name", BAD)
def test_bad_ids_are_refused_when_asked(name: str) -> None:
    made(name, 1)()
    with sslkernels.check_values(), pytest.raises(ValueError, match=r"-5|out of range|expected"):
        made(name, -5)()
