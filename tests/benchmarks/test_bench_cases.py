# SPDX-License-Identifier: Apache-2.0
"""The declared cases under pytest-benchmark.

`pytest tests/benchmarks/test_bench_cases.py --benchmark-only` times them at their real size. Without that option
each runs once at a tiny size, after the same gate, so that no case rots.
"""

import pytest

from benchmarks.cases import FAMILIES
from benchmarks.worker import check

pytest.importorskip("pytest_benchmark")
STEPS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for cases in FAMILIES.values()
    for case in cases
    for name in [*(c.name for c in case.contenders), "gemm"]
]


@pytest.mark.parametrize(("case", "name"), STEPS)
def test_step(case, name, benchmark, request):
    full = request.config.getoption("benchmark_only")
    case = case if full else case.tiny()
    if name != "gemm":
        assert check(case, [name])[name]["ok"], check(case, [name])[name]
    step = case.step(name, case.make_inputs())
    benchmark.disabled = not full  # then it calls once and reports nothing
    benchmark.group = case.name
    benchmark(lambda: step.backward(step.forward()))
