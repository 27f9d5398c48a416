# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the contrastive ops in the interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOTHING = (None, None, None, None, None, False)


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


def features(n: int, m: int, d: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of unit length, the second matrix with columns side by side in memory."""
    q = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    k = torch.nn.functional.normalize(torch.randn(m, d), dim=1)
    return q.to(dtypes[0]), k.T.contiguous().T.to(dtypes[-1])


# the interpreter's tiles are 16 x 16, features in pieces of 16 above 32
SIZES = [(1, 1, 1), (15, 17, 3), (16, 16, 16), (17, 33, 32), (31, 16, 33), (5, 100, 48), (40, 7, 50), (0, 3, 4)]


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_logsumexp(compare: Callable, n: int, m: int, d: int) -> None:
    q, k = features(n, m, d, torch.float32)
    compare("similarity_logsumexp", q, k, None, 3.0, *NOTHING, (1.0,), True, True, None)
