# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import norm_cases as cases
import pytest
import torch
from torch import nn

from sslkernels.nn import GlobalBatchNorm, global_batch_norm

SIZES = (2, 4, 1)
ROWS = ("y", "dx", "eval")


@pytest.mark.parametrize("kind", ["plain", "without affine", "without averages", "equal averages"])
def test_is_batch_norm_of_all_rows(ranks, kind):
    expected = cases.passed(cases.norm(kind), *cases.inputs(SIZES))
    found = ranks.run(cases.step, "3", kind, SIZES)
    for key, exact in expected.items():
        parts = [outcome[key] for outcome in found]
        if key in ROWS:
            torch.testing.assert_close(torch.cat(parts), exact, rtol=1e-10, atol=1e-12)
        elif key in ("weight", "bias"):
            torch.testing.assert_close(sum(parts), exact, rtol=1e-10, atol=1e-12)
        else:
            for part in parts:
                torch.testing.assert_close(part, exact, rtol=1e-10, atol=1e-12)


def test_takes_the_place_of_every_batch_norm():
    module = nn.Sequential(nn.Linear(4, 3), nn.ModuleDict({"norm": nn.BatchNorm1d(3)}), nn.BatchNorm2d(3).eval())
    parameters, buffers = list(module.parameters()), list(module.buffers())
    global_batch_norm(module)
    assert isinstance(module[1]["norm"], GlobalBatchNorm) and isinstance(module[2], GlobalBatchNorm)
    assert module[1]["norm"].training and not module[2].training
    assert all(a is b for a, b in zip(parameters, module.parameters()))
    assert all(a is b for a, b in zip(buffers, module.buffers()))


def test_alone_is_batch_norm():
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(GlobalBatchNorm(3).double()(x), nn.BatchNorm1d(3).double()(x))
    with pytest.raises(ValueError, match=r"expected \(N, 3, ...\), got shape \(5, 4\)"):
        GlobalBatchNorm(3)(torch.randn(5, 4))
