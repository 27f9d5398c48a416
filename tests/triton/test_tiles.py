# SPDX-License-Identifier: Apache-2.0
"""What every Triton launcher shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sslkernels.triton._tiles import precision

NAMED = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@pytest.fixture
def untouched() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", NAMED)
def test_precision_that_is_named(untouched: None, name: str) -> None:
    torch.set_float32_matmul_precision(name)
    assert precision() == NAMED[name]


@pytest.mark.parametrize("where", [torch.backends, torch.backends.cuda.matmul], ids=["all", "matmul"])
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_precision_of_a_backend(untouched: None, where: object, value: str) -> None:
    """torch.get_float32_matmul_precision raises an error from here on."""
    where.fp32_precision = value  # type: ignore[attr-defined]
    assert precision() == value
