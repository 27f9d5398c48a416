# SPDX-License-Identifier: Apache-2.0
"""The declared cases under pytest-benchmark.

`pytest tests/benchmarks/test_bench_cases.py --benchmark-only` times them at their real size. Without that option
each runs once at a tiny size, after the same gate, so that no case rots; what `torch.compile`
would take seconds to compile then runs as it is written.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.cases import FAMILIES
from benchmarks.stats import OURS
from benchmarks.worker import check

pytest.importorskip("pytest_benchmark")
STEPS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for cases in FAMILIES.values()
    for case in cases
    for name in [*(c.name for c in case.contenders), *case.floors()]
]


@pytest.mark.parametrize(("case", "name"), STEPS)
def test_step(case, name, benchmark, request):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)  # the originals' masks draw from all three
    full = request.config.getoption("benchmark_only")
    case = case if full else case.tiny()
    if name not in case.floors():
        if case.contender(name).compile and not full:
            case = replace(case, contenders=tuple(replace(c, compile=False) for c in case.contenders))
        found = check(case, [name])[name]
        if found.get("error", "").startswith(("ImportError", "ModuleNotFoundError")) and not name.startswith(OURS):
            pytest.skip(f"{name}: {found['error']}")  # a package that is not installed, or of another release
        assert found["ok"], found
    step = case.step(name, case.make_inputs())
    benchmark.disabled = not full  # then it calls once and reports nothing
    benchmark.group = case.name
    benchmark.pedantic(lambda: step.backward(step.forward()), setup=step.restore, rounds=15 if full else 1)
