# SPDX-License-Identifier: Apache-2.0
"""Panels: how many rows each has, and products that add up in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkernels.triton import _panel

BIG = 1 << 40


@given(st.integers(0, BIG), st.integers(0, 1 << 30), st.sampled_from((2, 4)), st.integers(1, 1 << 33))
def test_panel_rows(rows: int, columns: int, itemsize: int, limit: int) -> None:
    step = _panel.panel_rows(rows, columns, itemsize, limit)
    assert 1 <= step <= max(rows, 1)
    assert step * columns * itemsize <= max(limit, _panel.TILE * columns * itemsize)
    assert step % _panel.TILE == 0 or step >= rows
    count = -(-rows // step)
    assert step - rows / max(count, 1) < 2 * _panel.TILE + count or count <= 1  # even


def test_panels_cover_the_rows() -> None:
    found = list(_panel.panels(1000, 10, torch.bfloat16, limit=400 * 20, tile=16))
    assert [x.start for x in found] == [0, *(x.stop for x in found[:-1])]
    assert found[-1].stop == 1000
    assert max(x.stop - x.start for x in found) == 336
    assert list(_panel.panels(0, 10, torch.float32)) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=str
)
def test_products(dtypes: tuple, device: str) -> None:
    a, b = torch.randn(2, 5, 7).to(dtypes[0]), torch.randn(7, 2, 3).to(dtypes[1]).transpose(0, 1)
    total = torch.empty(5, 3, device=device)
    _panel.product(a[0].to(device), b[0].to(device), total)
    _panel.add_product(total, a[1].to(device), b[1].to(device))
    if device == "cpu":
        torch.testing.assert_close(total.double(), (a.double() @ b.double()).sum(0), rtol=1e-5, atol=1e-5)
