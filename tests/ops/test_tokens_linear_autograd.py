# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy for autograd, the dispatcher and the compiler; its threads, instruction sets and memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import tokens_linear_cases as cases
import torch
from tokens_linear_cases import check, evaluate, ours, random_case
from torch import Tensor

from sslkernels import _library, ops
from sslkernels.ops import _linear_cross_entropy as module
from sslkernels.reference import _linear_cross_entropy as definition
from sslkernels.reference import tokens as reference

OP = torch.ops.sslkernels.linear_cross_entropy.default
ROWS = torch.ops.sslkernels.linear_cross_entropy_rows.default
ROWS_BACKWARD = torch.ops.sslkernels.linear_cross_entropy_rows_backward.default
FORMS = {"whole": 8 << 20, "cut": 0}
built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


@pytest.fixture(params=FORMS)
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PANEL_BYTES", FORMS[request.param])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "smooth"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, options: dict[str, float], panels: None) -> None:
    case = random_case(9, 4, 7, torch.float64)

    def function(*layer: Tensor) -> Tensor:
        return ours(cases.Case(*layer, case.target), reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case[:3] if x is not None])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction: str) -> None:
    case = random_case(9, 4, 7)
    loss = ours(case._replace(input=case.input.requires_grad_()), reduction=reduction)
    (grad,) = torch.autograd.grad((loss * loss).sum(), case.input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported; use sslkernels\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("upstream", [1.0, -0.5, 8192.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_upstream_gradient(dtype: torch.dtype, upstream: float) -> None:
    """Scaled once, before it is rounded: what a gradient scaler finds in float16 has not underflowed."""
    case = random_case(9, 4, 2003, dtype)
    leaves = [x.requires_grad_() for x in case[:3] if x is not None]
    (ours(case) * upstream).backward()
    exact = evaluate(cases.written_out, case.to(torch.float64))
    for x, e in zip(leaves, exact[1:]):
        assert x.grad is not None
        assert (x.grad.double() / upstream - e).norm() <= 2 * torch.finfo(dtype).eps * e.norm() + 1e-5 * e.norm()


def test_a_gradient_that_is_asked_for_as_it_is_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a vocabulary is the largest tensor of a step: the kernel's memory becomes weight.grad."""
    made: list[int] = []
    original = module._loss

    def spy(*args: Any) -> Any:
        out = original(*args)
        made.extend(x.data_ptr() for x in (out[0].grad_fn.saved_tensors if out[0].grad_fn else ()))
        return out

    monkeypatch.setattr(module, "_loss", spy)
    case = random_case(9, 4, 2003)
    leaves = [x.requires_grad_() for x in case[:3] if x is not None]
    ours(case).backward()
    for x in leaves:
        assert x.grad is not None and x.grad.data_ptr() in made


def arguments(
    dtype: torch.dtype = torch.float32, mask: tuple[bool, ...] = (True, True, True), size: int = 0
) -> list[Any]:
    case = random_case(30, 6, 21, dtype)
    return [*case, -100, 0.1, 1e-2, True, size, list(mask)]


MASKS = [(True, True, True), (True, True, False), (True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize("mask", [*MASKS, (True, False, True), (False, False, False)])
def test_only_what_is_asked_for_is_made(mask: tuple[bool, ...]) -> None:
    """A frozen vocabulary has no gradient at all, which saves a product and the memory; so for the rows."""
    for op in (OP, ROWS_BACKWARD):
        results = []
        for some in (mask, (True, True, True)):
            torch.manual_seed(0)
            x = arguments(mask=some)
            if op is ROWS_BACKWARD:
                _, stats = ROWS(*x[:7])
                x = [torch.rand(30), *x[:4], stats, *x[4:7], list(some)]
            results.append(op(*x))
        offset = len(results[0]) - 3
        for x, y, asked in zip(results[0][offset:], results[1][offset:], mask):
            assert x.numel() == (y.numel() if asked else 0)
            if asked:
                torch.testing.assert_close(x, y)
        if offset:
            torch.testing.assert_close(results[0][0], results[1][0])


def test_requires_grad_decides_what_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    original = module._loss

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(module, "_loss", spy)
    case = random_case(9, 4, 21)
    assert case.bias is not None
    for mask in MASKS:
        for x, wanted in zip((case.input, case.weight, case.bias), mask):
            x.requires_grad_(wanted)
        assert ours(case).requires_grad
        with torch.no_grad():
            assert not ours(case).requires_grad
    assert seen == [x for mask in MASKS for x in (list(mask), [False] * 3)]


def test_autocast_casts_input_and_weight_and_returns_float32() -> None:
    case = random_case(9, 4, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(ours, case)
    assert all(x.dtype == torch.float32 for x in results)
    assert torch.equal(results[0], ours(case._replace(input=case.input.bfloat16(), weight=case.weight.bfloat16())))


# what the dispatcher and the compiler see


def test_opcheck() -> None:
    for dtype, mask in ((torch.float32, (True, True, True)), (torch.bfloat16, (True, False, False))):
        x = arguments(dtype, mask)
        for tensor, wanted in zip(x, mask):
            tensor.requires_grad_(wanted)
        torch.library.opcheck(OP, x)
    torch.library.opcheck(ROWS, x[:7])
    x = [y.detach() if isinstance(y, Tensor) else y for y in x]
    x[2] = None
    _, stats = ROWS(*x[:7])
    torch.library.opcheck(ROWS_BACKWARD, [torch.rand(30), *x[:4], stats, *x[4:7], [True, True, False]])


@pytest.mark.parametrize("selects", [("cpu",), ()], ids=["rows are left out", "rows are masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_gives_what_the_kernel_gives(
    dtype: torch.dtype, selects: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it leaves ignored rows out; on a device, which must not be asked how many there are, it masks them."""
    monkeypatch.setattr(definition, "SELECTS", selects)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for mask in (*MASKS, (False, False, False)):
        x = arguments(dtype, mask)
        with torch.no_grad():
            got, want = OP(*x), OP.redispatch(key, *x)
            assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in want]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            got, want = ROWS(*x[:7]), ROWS.redispatch(key, *x[:7])
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
            x = [torch.rand(30), *x[:4], got[1], *x[4:7], list(mask)]
            got, want = ROWS_BACKWARD(*x), ROWS_BACKWARD.redispatch(key, *x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_target_that_is_no_class_is_nan_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not looked at: its row is NaN, nothing is read out of bounds, others are untouched."""
    monkeypatch.setattr(definition, "SELECTS", ())
    case = random_case(9, 4, 21, selected=1.0)
    want = ours(case, reduction="none")
    case.target[3], case.target[5] = 21, -1
    loss = reference.linear_cross_entropy(case.input, case.weight, case.target, linear_bias=case.bias, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3, 5]
    torch.testing.assert_close(loss[~loss.isnan()], want[~loss.isnan()])
    mean, dinput, *_ = OP.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd),
        *case, -100, 0.0, 0.0, True, 0, [True] * 3,
    )  # fmt: skip
    assert mean.isnan() and dinput.isnan().any(1).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("selects", [("cpu",), ()], ids=["rows are left out", "rows are masked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_public_reference_is_the_definition(
    reduction: str, selects: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(definition, "SELECTS", selects)
    case = random_case(9, 4, 21, torch.float64)

    def function(case: cases.Case, **options: Any) -> Tensor:
        return reference.linear_cross_entropy(case.input, case.weight, case.target, linear_bias=case.bias, **options)

    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2}
    cotangent = torch.rand(9) if reduction == "none" else None
    got, want = (evaluate(f, case, cotangent, **options) for f in (function, cases.written_out))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_with_its_backward(backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    case = random_case(9, 4, 21)
    cotangent = torch.rand(9) if reduction == "none" else None
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    got, want = (evaluate(f, case, cotangent, reduction=reduction) for f in (compiled, ours))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_of_a_transposed_layer_in_one_graph(backend: str) -> None:
    """The layer is a (D, V) head's transpose, the rows are columns of memory; the loss is scaled before backward."""
    torch._dynamo.reset()
    case = random_case(9, 4, 21)
    x, head = case.input.T.contiguous().requires_grad_(), case.weight.detach().T.contiguous().requires_grad_()

    def scaled(x: Tensor, head: Tensor) -> Tensor:
        return 3 * ops.linear_cross_entropy(x.T, head.T, case.target)

    compiled = torch.compile(scaled, fullgraph=True, backend=backend)
    got, want = (torch.autograd.grad(f(x, head), (x, head)) for f in (compiled, scaled))
    torch.testing.assert_close(got, want)


def test_exported() -> None:
    case = random_case(9, 4, 21)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return ops.linear_cross_entropy(x, weight, target, label_smoothing=0.1)

    inputs = case.input, case.weight, case.target
    exported = torch.export.export(Module(), inputs).module()
    torch.testing.assert_close(exported(*inputs), Module()(*inputs))


# how the kernel cuts its work


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [60, 150], ids=["in the gradient", "and more"])
def test_threads(rows: int, reduction: str, threads: int, panels: None) -> None:
    """Enough work for two threads; right with one and with two, and the same bits when run again."""
    case = random_case(rows, 64, 3001, selected=1.0)
    assert 2 * 64 * case.weight.numel() > 2 * 4e6
    check(case, reduction=reduction)
    cotangent = torch.rand(rows) if reduction == "none" else None
    for x, y in zip(*(evaluate(ours, case, cotangent, reduction=reduction, label_smoothing=0.1) for _ in range(2))):
        assert torch.equal(x, y)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_each_instruction_set(dtype: torch.dtype, level: int, panels: None) -> None:
    for reduction in ("mean", "none"):
        check(random_case(40, 19, 83, dtype), reduction=reduction, label_smoothing=0.1, z_loss=1e-2)


MEMORY = """
import torch
from sslkernels import ops

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(rows, width, ignored):
    hidden, weight = torch.randn(rows, 256, requires_grad=True), torch.randn(width, 256, requires_grad={trained})
    target = torch.randint(width, (rows,))
    target[: int(rows * ignored)] = -100
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    ops.linear_cross_entropy(hidden, weight, target).backward()
    return peak() - before

torch.set_num_threads(2)
step(8, 64, 0)
print(step({rows}, 32768, {ignored}))
"""


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rows", "ignored", "part", "trained"),
    [(200, 0.0, 3, True), (200, 0.0, 3, False), (1200, 0.84, 3, True), (1024, 0.0, 5, True)],
    ids=["in the gradient", "frozen", "selected", "panels"],
)
def test_logits_are_never_stored(rows: int, ignored: float, part: int, trained: bool) -> None:
    """Beside the gradients a third of one copy of the selected rows' logits, a fifth of many rows'; eager has three."""
    code = MEMORY.format(trained=trained, rows=rows, ignored=ignored)
    used = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    gradients = 4 * 256 * (rows + (32768 if trained else 0))
    assert used - gradients < (1 - ignored) * rows * 32768 * 4 / part
