# SPDX-License-Identifier: Apache-2.0
"""How the CPU kernels cut their work: panels, tiles, threads, kept scores, instruction sets, 64-bit offsets."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import contrastive_cases as cases
import pytest
import torch
from contrastive_cases import OPS, POSITIVES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslkernels import _library
from sslkernels.ops import Exclude, self_similarity_logsumexp, similarity_logsumexp
from sslkernels.ops.contrastive import KEPT_BYTES

ALL = {**OPS, **POSITIVES}

pytestmark = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


def options_for(name: str, n: int, m: int) -> dict[str, Any]:
    if name == "sampled_logsumexp":
        return {"indices": torch.randint(m, (n, 40)), "mask": torch.rand(n, 40) < 0.9}
    if name in POSITIVES:
        return {"exclude": Exclude(diagonal=0, period=n // 2) if cases.is_self(ALL[name]) else Exclude(diagonal=m - n)}
    if cases.is_self(ALL[name]):
        return {"exclude": Exclude(diagonal=0, period=n // 2, key_mask=torch.rand(n) < 0.9)}
    groups = torch.randint(50, (n,)), torch.randint(50, (m,))
    return {"exclude": Exclude(3, None, *groups, torch.rand(m) < 0.9)}


def problem(name: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[cases.Op, Any, Any]:
    op = ALL[name]
    m = n if cases.is_self(op) else m
    return op, cases.random_tensors(op, n, m, d, dtypes=[dtype]), options_for(name, n, m)


# several panels (of 128 rows at least), scores kept and scores computed again. Each panel is worth more than
# 8e6 operations, so that a second thread is used
@pytest.mark.parametrize("shape", [(300, 700, 96), (1030, 1030, 32)], ids=["kept", "not kept"])
@pytest.mark.parametrize("name", ALL)
def test_panels_and_threads(name: str, shape: tuple[int, int, int], threads: int) -> None:
    """Right with one thread and with two, and each of them gives the same bits when it runs again."""
    op, tensors, options = problem(name, *shape)
    rows = 128 if shape[0] < 1024 else 256
    assert 2 * rows * shape[1] * shape[2] > 8e6
    assert (shape[0] * shape[1] * 4 <= KEPT_BYTES) == (shape[0] == 300)
    options = {**op.options, **options}
    cotangents = cases.cotangents_of(op, tensors, **options)
    exact = cases.truth(op, tensors, cotangents, **options)
    for wanted in (list(tensors), [key for key in tensors if key != "k"]):  # frozen keys have a sweep of their own
        first, again = (cases.evaluate(op.ours, tensors, cotangents, wanted, **options) for _ in range(2))
        cases.assert_stable(first, exact, torch.float32, tensors)
        for x, y in zip((*first.outputs, *first.gradients.values()), (*again.outputs, *again.gradients.values())):
            assert torch.equal(x, y)


@pytest.mark.parametrize("m", [1, 17, 40])
@pytest.mark.parametrize("name", OPS)
def test_more_threads_than_blocks_of_keys(name: str, m: int) -> None:
    """A thread owns a multiple of 16 keys: with few wide keys some of four threads have nothing to do."""
    n, d = 40, 16_000
    op, tensors, options = problem(name, n, m, d)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        cases.check(op, tensors, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("differ", [False, True], ids=["equal", "differ"])
@pytest.mark.parametrize("name", [name for name in OPS if name != "sampled_logsumexp"])
def test_tiles_without_a_pair(name: str, differ: bool, threads: int) -> None:
    """Sorted groups: whole tiles are left out, in the first panel and in later ones."""
    n, m = 600, 1100
    op, tensors, _ = problem(name, n, m, 16)
    keys = None if cases.is_self(op) else torch.arange(m) // 300
    exclude = Exclude(query_groups=torch.arange(n) // 260, key_groups=keys, differ=differ)
    cases.check(op, tensors, exclude=exclude)


def test_both_ways_of_the_cross_entropy(threads: int) -> None:
    """Exponentials of 64 rows are stored up to 64 MiB; beyond it the keys are swept twice, with the same result."""
    n, m, d = 64, 262_144, 2
    one_sweep = cases.random_tensors(OPS["similarity_cross_entropy"], n, m, d, dtypes=[torch.float32])
    two_sweeps = {**one_sweep, "k": torch.cat([one_sweep["k"], torch.randn(64, d)])}
    results = []
    for tensors in (one_sweep, two_sweeps):
        exclude = Exclude(diagonal=0, key_mask=torch.arange(len(tensors["k"])) < m)
        ours = OPS["similarity_cross_entropy"].ours
        results.append(cases.evaluate(ours, tensors, [torch.tensor(1.0)], exclude=exclude, weight=1 / n))
    one, two = results
    torch.testing.assert_close(two.outputs, one.outputs)
    assert not two.gradients["k"][m:].any()
    two.gradients["k"] = two.gradients["k"][:m]
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(two.gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_kept_scores_give_the_gradients_of_computed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for name in ALL if "lse" in name or "logsumexp" in name):
        op, tensors, options = problem(name, 70, 140, 9)
        options = {**op.options, **options}
        cotangents = cases.cotangents_of(op, tensors, **options)
        kept = cases.evaluate(op.ours, tensors, cotangents, **options)
        with monkeypatch.context() as patch:
            patch.setattr("sslkernels.ops.contrastive.KEPT_BYTES", 0)
            computed = cases.evaluate(op.ours, tensors, cotangents, **options)
        for key, gradient in kept.gradients.items():
            torch.testing.assert_close(gradient, computed.gradients[key], rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


class Kept(TorchDispatchMode):
    """The sizes of the scores that log-sum-exps keep."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().endswith("similarity_logsumexp"):
            self.sizes.append(out[-1].numel())
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_the_processor_keeps_scores(device: str) -> None:
    z = torch.empty(6, 4, device=device).zero_().requires_grad_()
    with Kept() as kept:
        similarity_logsumexp(z, z[:3])
        self_similarity_logsumexp(z)
    assert kept.sizes == ([18, 36] if device == "cpu" else [0, 0])


# instruction sets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_each_instruction_set(name: str, dtype: torch.dtype, level: int) -> None:
    op, tensors, options = problem(name, 66, 530, 19, dtype)
    cases.check(op, tensors, **options)


@pytest.mark.parametrize("cap", [-1, 3])
def test_a_level_that_does_not_exist_is_refused(cap: int) -> None:
    with pytest.raises(RuntimeError, match=r"cpu level must be 0 \(baseline\), 1 \(v3\) or 2 \(v4\)"):
        torch.ops.sslkernels.set_cpu_level(cap)


@pytest.mark.parametrize(("cap", "name"), [(0, "baseline"), (1, "v3")])
def test_the_environment_caps_the_level(cap: int, name: str) -> None:
    script = """
import torch, sslkernels
q = torch.randn(65, 9)
row, _ = sslkernels.ops.similarity_logsumexp(q, q)
torch.testing.assert_close(row, (q @ q.T).logsumexp(1))
print(torch.ops.sslkernels.cpu_level())
"""
    environment = {**os.environ, "SSLKERNELS_CPU_LEVEL": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= cap


# what the tile functions with a loop of arithmetic compute in
REGISTERS = {"v3": "ymm", "v4": "zmm"}
LOOPS = ["maxima", "sum_exp", "sum_exp_rows", "sum_exp_cols", "exp_rows", "merge", "factors", "weights", "weights_wide"]
LOOPS += ["rebase", "softplus", "softplus_weights", "add", "scale_rows", "divide", "dot", "axpy", "load", "exp_all"]


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    """Demangled name of each function of the library -> its instructions."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (binutils)")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(_library.path("cpu"))]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.+)>:$", text, flags=re.M)
    functions: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2]):
        functions[name] = functions.get(name, "") + body
    if not any("v4::" in name for name in functions):
        pytest.skip("the library has no copies for instruction sets (not x86-64), or no symbols")
    return functions


@pytest.mark.parametrize("level", REGISTERS)
@pytest.mark.parametrize("dtype", ["float", "double"])
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_are_vectorised(assembly: dict[str, str], loop: str, dtype: str, level: str) -> None:
    """Without -fopenmp-simd, or with -ftrapping-math, they are scalar, several times slower, and nothing else shows."""
    names = [name for name in assembly if re.search(rf"{level}::.*\b{loop}<{dtype}>\(", name)]
    assert names, f"no {level}::{loop}<{dtype}> in the library"
    packed = rf"\b(vf\w+|vmul|vmax|vadd|vdiv)p{dtype[0]}\b.*%{REGISTERS[level]}".replace("pf", "ps")
    assert any(re.search(packed, assembly[name]) for name in names), f"{level}::{loop}<{dtype}> is scalar"


# 64-bit offsets


def far_apart(rows: int, d: int, stride: int) -> Tensor:
    """(rows, d) bfloat16 whose rows lie `stride` elements apart, in memory of which only these rows are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (stride * rows + d), flags=flags)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((rows, d), (stride, 1))
    return x.copy_(torch.randn(rows, d))


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved only where it is touched")
@pytest.mark.parametrize("name", OPS)
def test_rows_farther_apart_than_32_bits(name: str) -> None:
    op, tensors, options = problem(name, 3, 3, 8, torch.bfloat16)
    tensors |= {key: far_apart(3, 8, 2**31 + 5) for key in ("q", "k") if key in tensors}
    dense = {key: x.contiguous() if key in ("q", "k") else x for key, x in tensors.items()}
    options = {**op.options, **options}
    cotangents = cases.cotangents_of(op, dense, **options)
    result = cases.evaluate(op.ours, tensors, cotangents, **options)
    expected = cases.evaluate(op.ours, dense, cotangents, **options)
    for x, y in zip(result.outputs, expected.outputs):
        assert torch.equal(x, y)
    for key, gradient in result.gradients.items():
        assert torch.equal(gradient, expected.gradients[key])
