# SPDX-License-Identifier: Apache-2.0
"""linear_soft_cross_entropy in autograd and the compiler, on one and two threads, on each instruction set."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import distillation_linear_cases as cases
import pytest
import torch
from distillation_linear_cases import check, random_case
from torch import Tensor

from sslkernels import _library, ops
from sslkernels.ops import _distillation_linear as module
from sslkernels.reference import distillation as reference

OP = torch.ops.sslkernels.linear_soft_cross_entropy.default
FORMS = {"whole": 8 << 20, "cut": 0}
built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


@pytest.fixture(params=FORMS)
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PANEL_BYTES", FORMS[request.param])


@pytest.mark.parametrize("shared", [False, True], ids=["own layer", "shared layer"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction: str, shared: bool, panels: None) -> None:
    case = random_case(3, 2, 4, 21, 5, torch.float64)

    def function(student: Tensor, weight: Tensor) -> Tensor:
        # a shared layer is a constant for the teacher, which differences would not see
        other = case.weight if shared else case.teacher_weight
        return cases.ours(case._replace(student=student, weight=weight, teacher_weight=other), reduction=reduction)[0]

    assert torch.autograd.gradcheck(function, (case.student.requires_grad_(), case.weight.clone().requires_grad_()))


def test_double_backward_is_refused() -> None:
    case = random_case(3, 2, 4, 21, 5)
    loss, _ = cases.ours(case._replace(student=case.student.requires_grad_()))
    (grad,) = torch.autograd.grad(loss * loss, case.student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported; use sslkernels\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("upstream", [1.0, -0.5, 8192.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_upstream_gradient(dtype: torch.dtype, upstream: float) -> None:
    """Scaled once, before it is rounded: what a gradient scaler finds in float16 has not underflowed."""
    case = random_case(3, 2, 4, 2003, 5, dtype)
    student, weight = case.student.requires_grad_(), case.weight.requires_grad_()
    loss, _ = cases.ours(case._replace(student=student, weight=weight))
    (loss * upstream).backward()
    exact = cases.evaluate(cases.written_out, case.to(torch.float64))
    for x, e in zip((student.grad, weight.grad), exact[2:]):
        assert x is not None
        assert (x.double() / upstream - e).norm() <= 2 * torch.finfo(dtype).eps * e.norm() + 1e-5 * e.norm()


def arguments(dtype: torch.dtype = torch.float32, mask: tuple[bool, bool] = (True, True), size: int = 0) -> list[Any]:
    case = random_case(3, 2, 4, 21, 5, dtype)
    return [*case, 0.1, 0.04, True, True, True, size, list(mask)]


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_is_made(mask: tuple[bool, bool], panels: None) -> None:
    """Frozen prototypes have no gradient at all, which saves a product; a student alone may be frozen as well."""
    full = OP(*arguments())
    torch.manual_seed(0)
    some = OP(*arguments(mask=mask))
    torch.manual_seed(0)
    full = OP(*arguments())
    for x, y, asked in zip(some[2:], full[2:], mask):
        assert x.numel() == (y.numel() if asked else 0)
        if asked:
            torch.testing.assert_close(x, y)
    torch.testing.assert_close(some[0], full[0])


def test_requires_grad_decides_what_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    original = module._loss

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(module, "_loss", spy)
    case = random_case(3, 2, 4, 21, 5)
    for student, weight in ((True, True), (True, False), (False, True)):
        case.student.requires_grad_(student), case.weight.requires_grad_(weight)
        assert cases.ours(case)[0].requires_grad
        with torch.no_grad():
            assert not cases.ours(case)[0].requires_grad
    assert seen == [[True, True], [False] * 2, [True, False], [False] * 2, [False, True], [False] * 2]


def test_autocast_casts_the_features_and_returns_float32() -> None:
    case = random_case(3, 2, 4, 21, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, mean, dstudent, dweight = cases.evaluate(cases.ours, case)
    assert loss.dtype == mean.dtype == dstudent.dtype == dweight.dtype == torch.float32
    features = {name: getattr(case, name).bfloat16() for name in ("student", "weight", "teacher", "teacher_weight")}
    assert torch.equal(loss, cases.ours(case._replace(**features))[0])


# what the dispatcher and the compiler see


def test_opcheck() -> None:
    for dtype, mask, size in (
        (torch.float32, (True, True), 0),
        (torch.bfloat16, (True, False), 1 << 20),
        (torch.float64, (False, True), 0),
    ):
        x = arguments(dtype, mask, size)
        x[0].requires_grad_(mask[0]), x[1].requires_grad_(mask[1])
        torch.library.opcheck(OP, x)
    x = arguments()
    x[3] = x[4] = x[5] = None
    x[10] = False
    torch.library.opcheck(OP, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_gives_what_the_kernel_gives(dtype: torch.dtype) -> None:
    for mask in ((True, True), (True, False), (False, False)):
        x = arguments(dtype, mask)
        with torch.no_grad():
            got = OP(*x)
            want = OP.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *x)
        assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in want]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exclude", [True, False])
def test_the_public_reference_is_the_definition(exclude: bool) -> None:
    case = random_case(3, 2, 4, 21, 5, torch.float64)

    def function(case: cases.Case, **options: Any) -> tuple[Tensor, Tensor]:
        *first, row_weight = case
        return reference.linear_soft_cross_entropy(*first, row_weight=row_weight, return_center=True, **options)

    for reduction in ("mean", "sum"):
        options: dict[str, Any] = {"exclude_same_view": exclude, "reduction": reduction}
        got, want = (cases.evaluate(f, case, **options) for f in (function, cases.written_out))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_with_its_backward(backend: str) -> None:
    torch._dynamo.reset()
    case = random_case(3, 2, 4, 21, 5)
    compiled = torch.compile(cases.ours, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    torch.testing.assert_close(cases.evaluate(compiled, case), cases.evaluate(cases.ours, case))


def test_exported() -> None:
    case = random_case(3, 2, 4, 21, 5)

    class Module(torch.nn.Module):
        def forward(self, student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
            return ops.linear_soft_cross_entropy([student[0], student[1:]], weight, teacher)

    exported = torch.export.export(Module(), case[:3]).module()
    torch.testing.assert_close(exported(*case[:3]), Module()(*case[:3]))


# how the kernel cuts its work


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_threads(frozen: bool, threads: int, panels: None) -> None:
    """Enough work for two threads; right with one and with two, and the same bits when run again."""
    case = random_case(5, 2, 12, 3001, 64)
    assert 2 * case.student[..., 0].numel() * case.weight.numel() > 2 * 4e6
    check(case, frozen)
    for x, y in zip(*(cases.evaluate(cases.ours, case, frozen) for _ in range(2))):
        assert torch.equal(x, y)


@built
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_each_instruction_set(dtype: torch.dtype, frozen: bool, level: int, panels: None) -> None:
    check(random_case(4, 2, 5, 83, 19, dtype), frozen)


MEMORY = """
import torch
from sslkernels import ops

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(batch, width):
    hidden, weight = torch.randn(10, batch, 16, requires_grad=True), torch.randn(width, 16, requires_grad={trained})
    ops.linear_soft_cross_entropy(hidden, weight, torch.randn(2, batch, 16)).backward()

torch.set_num_threads(2)
step(2, 64)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
step(32, 65536)
print(peak() - before)
"""


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_logits_are_never_stored(trained: bool) -> None:
    """Of 384 rows of logits at most a quarter is there at a time; without the fusion it is nearly two times all."""
    command = [sys.executable, "-c", MEMORY.format(trained=trained)]
    used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    layers = 4 * 65536 * 16 * (2 if trained else 1)
    assert used - layers < 384 * 65536 * 4 / 4
