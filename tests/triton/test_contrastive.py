# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the contrastive ops in the interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 33), (0, 4)])
def test_l2_normalize(compare: Callable, rows: int, columns: int, dtype: torch.dtype) -> None:
    xs = [torch.randn(rows, columns).to(dtype), torch.randn(columns, 2 * rows).to(dtype).T]
    for x in xs:
        x[:1] = 0.0  # shorter than eps
    xs[1][1:2] = torch.nan
    compare("l2_normalize", xs, 1e-12)
    z, norm = torch.ops.sslkernels.l2_normalize(xs, 1e-12)
    compare("l2_normalize_backward", torch.randn(columns, 3 * rows).to(dtype).T, z, norm, 1e-12)
