# SPDX-License-Identifier: Apache-2.0
"""Offsets beyond 2^31 elements: what an index of 32 bits would read or write lies elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslkernels import ops

pytestmark = pytest.mark.gpu
WIDTH = 1024
ROWS = 2**31 // WIDTH + 3


@pytest.fixture(autouse=True)
def room() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of device memory, {free >> 30} are free")


@pytest.fixture
def tall() -> Tensor:
    """(ROWS, WIDTH) bfloat16, 4 GiB: zeros but for the last rows."""
    x = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    x[-5:] = torch.randn(5, WIDTH, device="cuda").to(x.dtype)
    return x


def test_similarity_logsumexp(tall: Tensor) -> None:
    k = torch.randn(16, WIDTH, device="cuda", dtype=torch.bfloat16)
    tall.requires_grad_()
    rows = ops.similarity_logsumexp(tall, k, 0.05, columns=False)[0]
    rows[-5:].sum().backward()
    small = tall.detach()[-5:].double().requires_grad_()
    expected = (0.05 * small @ k.double().T).logsumexp(1)
    expected.sum().backward()
    assert torch.allclose(rows[-5:].double(), expected, rtol=1e-2)
    assert (tall.grad[-5:].double() - small.grad).norm() <= 2e-2 * small.grad.norm()
    assert not tall.grad[:-5].any()


def test_nearest(tall: Tensor) -> None:
    values, indices = ops.nearest(tall[-5:], tall, metric="l2")
    assert torch.equal(indices, torch.arange(ROWS - 5, ROWS, device="cuda"))
    assert not values.any()


def test_standardize(tall: Tensor) -> None:
    z = ops.standardize(tall)
    x = tall[-5:].double()
    mean = x.sum(0) / ROWS
    spread = ((x**2).sum(0) / ROWS - mean**2 + 1e-5).sqrt()
    assert torch.allclose(z[-5:].double(), (x - mean) / spread, rtol=2e-2, atol=1e-2)


def test_gather_tokens(tall: Tensor) -> None:
    ids = torch.tensor([[ROWS - 1, 0, ROWS - 4]], device="cuda")
    assert torch.equal(ops.gather_tokens(tall[None], ids)[0], tall[ids[0]])


def test_ema_update(tall: Tensor) -> None:
    target = torch.zeros_like(tall)
    ops.ema_update_([target], [tall], 0.5)
    assert torch.equal(target[-5:], tall[-5:] / 2)
    assert not target[:-5].any()


def test_masked_regression(tall: Tensor) -> None:
    rows = ops.masked_regression(tall, torch.zeros_like(tall), loss="l2", reduction="none")
    expected = tall[-5:].double().square().mean(1)
    assert torch.allclose(rows[-5:].double(), expected, rtol=1e-2)
    assert not rows[:-5].any()
