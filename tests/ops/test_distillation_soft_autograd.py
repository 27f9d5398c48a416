# SPDX-License-Identifier: Apache-2.0
"""soft_cross_entropy and softmax_center in autograd and the compiler, on 1 and 2 threads, on each instruction set."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import distillation_cases as cases
import pytest
import torch
from distillation_cases import Case, check, random_case
from torch import Tensor

from sslkernels import _library, ops
from sslkernels.ops import _registry
from sslkernels.reference import distillation as reference

SOFT = [name for name in _registry.OPS if name.startswith("soft_cross_entropy") or name == "softmax_center"]
built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")
F32, F64 = torch.float32, torch.float64


def small_case(views: str = "stacked", dtype: torch.dtype = F64, **options: Any) -> Case:
    if views == "rows":
        return random_case(None, 1, 4, 6, dtypes=(dtype, dtype), **options)
    case = random_case(4, 2, 3, 5, dtypes=(dtype, dtype), **options)
    if views == "list":
        student, teacher = (xs[0] for xs in case[:2])
        return case._replace(student=[student[0], student[1:3], student[3]], teacher=list(teacher))
    return case


VIEWS = ("stacked", "list", "rows")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("views", VIEWS)
def test_gradcheck(views: str, reduction: str) -> None:
    case = small_case(views, weighted=True)

    def function(*student: Tensor) -> Tensor:
        return cases.ours(case._replace(student=list(student)), reduction=reduction, student_temp=0.5)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case.student])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction: str) -> None:
    case = small_case()
    leaf = case.student[0].requires_grad_()
    loss = cases.ours(case, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss * loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported; use sslkernels\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 2.0, -0.5])
def test_upstream_gradient(upstream: float, reduction: str, dtype: torch.dtype) -> None:
    """As it is where it is one; else times what came."""
    case = small_case("list", dtype)
    once = cases.evaluate(cases.ours, case, None, reduction=reduction)[1]
    leaves = [x.clone().requires_grad_() for x in case.student]
    (upstream * cases.ours(case._replace(student=leaves), reduction=reduction)).sum().backward()
    torch.testing.assert_close([x.grad for x in leaves], [upstream * g for g in once])


def test_teacher_center_and_weights_are_constants() -> None:
    case = small_case(weighted=True)
    student, teacher = case.student[0].requires_grad_(), case.teacher[0].requires_grad_()
    center, weight = case.center.requires_grad_(), case.row_weight.requires_grad_()  # type: ignore[union-attr]
    for reduction in ("mean", "none"):
        loss, mean = cases.ours(case, reduction=reduction, return_center=True)
        assert not mean.requires_grad
        for constant in (teacher, center, weight):
            assert torch.autograd.grad(loss.sum(), constant, allow_unused=True, retain_graph=True)[0] is None
        assert torch.autograd.grad(loss.sum(), student)[0].any()


def test_the_logits_and_the_teacher_may_change_before_backward() -> None:
    """The mean has kept neither, and lets the logits go."""
    case = small_case()
    expected = cases.evaluate(cases.ours, case)[1][0]
    leaf = case.student[0].requires_grad_()
    logits = leaf * 1
    loss = ops.soft_cross_entropy(logits, case.teacher[0], case.center)
    with torch.no_grad():
        logits.zero_()
        case.teacher[0].zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


def test_no_gradient_is_made_where_nobody_asks() -> None:
    case = small_case()
    arguments = (case.student, case.teacher, None, None, 0.1, 0.04, True, True)
    assert [x.numel() for x in torch.ops.sslkernels.soft_cross_entropy(*arguments, [False, False])] == [1, 0, 1, 0]
    with torch.no_grad():
        case.student[0].requires_grad_()
        assert not cases.ours(case).requires_grad


def test_autocast_leaves_the_arithmetic_in_float32() -> None:
    case = small_case(dtype=F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cases.ours(case)
    assert torch.equal(value, cases.ours(case))
    assert cases.ours(small_case(dtype=torch.bfloat16)).dtype == F32


# the gradient in the memory of the logits


def distilled(case: Case, inplace: bool, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, int]:
    """Loss, mean, gradient of a prototype layer, and the logits' address; the layer makes the logits."""
    layer = torch.nn.Linear(7, case.student[0].shape[-1], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.3, 0.3, layer.weight.numel()).reshape(layer.weight.shape))
    hidden = torch.linspace(-1, 1, 4 * 3 * 7, dtype=dtype).reshape(4, 3, 7)
    logits = layer(hidden)
    loss, mean = ops.soft_cross_entropy(logits, case.teacher[0], case.center, inplace=inplace, return_center=True)
    (loss * scale).backward()
    assert layer.weight.grad is not None
    return loss.detach(), mean, layer.weight.grad, logits.data_ptr()


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_in_place_is_the_same_to_the_last_bit(scale: float, dtype: torch.dtype) -> None:
    case = random_case(4, 2, 3, 2100, dtypes=(dtype, dtype))
    for got, want in zip(distilled(case, True, dtype, scale)[:3], distilled(case, False, dtype, scale)[:3]):
        assert torch.equal(got, want)


def test_in_place_writes_over_the_logits_and_nowhere_else() -> None:
    case = small_case(dtype=F32)
    want = cases.evaluate(cases.ours, case)[1][0]
    logits = case.student[0].requires_grad_() * 1.0
    loss = ops.soft_cross_entropy(logits, case.teacher[0], case.center, inplace=True)
    assert torch.equal(logits.detach(), want)
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss.backward()
    assert seen == [logits.data_ptr()]


def test_in_place_of_a_list_of_which_some_are_frozen() -> None:
    case = small_case("list", F32)
    want = cases.evaluate(cases.ours, case)[1]
    leaves = [x.clone().requires_grad_(i != 1) for i, x in enumerate(case.student)]
    logits = [x * 1.0 for x in leaves]
    ops.soft_cross_entropy(logits, case.teacher, case.center, inplace=True).backward()
    assert torch.equal(logits[1], case.student[1])
    for i in (0, 2):
        assert torch.equal(leaves[i].grad, want[i])  # type: ignore[arg-type]


def test_in_place_is_noticed_by_who_has_saved_the_logits() -> None:
    case = small_case(dtype=F32)
    logits = case.student[0].requires_grad_().exp()  # keeps its result for backward
    loss = ops.soft_cross_entropy(logits, case.teacher[0], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_has_one_backward_and_the_gradient_must_stay() -> None:
    case = small_case(dtype=F32)
    logits = case.student[0].requires_grad_() * 1.0
    loss = ops.soft_cross_entropy(logits, case.teacher[0], inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away by the first backward"):
        loss.backward()
    logits = case.student[0].requires_grad_() * 1.0
    loss = ops.soft_cross_entropy(logits, case.teacher[0], inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_writes_nothing_where_nobody_needs_a_gradient() -> None:
    case = small_case(dtype=F32)
    before = case.student[0].clone()
    value = ops.soft_cross_entropy(case.student[0], case.teacher[0], inplace=True)
    with torch.no_grad():
        same = ops.soft_cross_entropy(case.student[0].requires_grad_() * 1.0, case.teacher[0], inplace=True)
    assert torch.equal(case.student[0], before) and torch.equal(value, same)


# what the dispatcher and the compiler see


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each op: one tensor, lists, rows; with gradient and without; 16 bits."""
    out: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SOFT}
    for views, dtype in (("stacked", F32), ("list", torch.bfloat16), ("rows", torch.float16)):
        case = small_case(views, dtype, weighted=views == "list", center="each" if views == "stacked" else "one")
        center = None if case.center is None else case.center.reshape(-1, case.center.shape[-1])
        options = (case.teacher, center, case.row_weight, 0.1, 0.04, views != "rows")
        wanted = [i != 1 for i in range(len(case.student))]
        student = [x.requires_grad_(w) for x, w in zip(case.student, wanted)]
        out["soft_cross_entropy"] += [(student, *options, True, [*wanted, views == "list"])]
        out["soft_cross_entropy"] += [([x.detach() for x in student], *options, False, [False] * len(wanted) + [True])]
        out["soft_cross_entropy_"] += [([x.detach().clone() for x in student], *options, True, [*wanted, True])]
        out["soft_cross_entropy_rows"] += [(student, *options, views == "rows")]
        rows = sum(1 if x.ndim == 2 else len(x) for x in student), student[0].shape[-2]
        grad = torch.randn(rows, dtype=case.wide)
        out["soft_cross_entropy_rows_backward"] += [(grad, [x.detach() for x in student], *options, wanted)]
        out["softmax_center"] += [(case.teacher[0].flatten(0, -2), None if center is None else center[0], 0.07)]
    return out


@pytest.mark.parametrize("name", SOFT)
def test_opcheck(name: str) -> None:
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.sslkernels, name).default, arguments)


def fallback(name: str, *arguments: Any) -> Any:
    op = getattr(torch.ops.sslkernels, name).default
    with torch.no_grad():
        return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *arguments)


@pytest.mark.parametrize("name", SOFT)
def test_the_reference_gives_what_the_kernel_gives(name: str) -> None:
    for arguments in samples()[name]:
        # one op writes over what it is given
        same = ([x.clone() for x in arguments[0]], *arguments[1:]) if name.endswith("_") else arguments
        with torch.no_grad():
            got, want = getattr(torch.ops.sslkernels, name).default(*arguments), fallback(name, *same)
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        rtol = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(arguments[0][0].dtype, 2e-5)
        torch.testing.assert_close(list(got), list(want), rtol=rtol, atol=1e-6)
        if name.endswith("_"):
            torch.testing.assert_close(arguments[0], same[0], rtol=rtol, atol=1e-6)


def public_reference(case: Case, **options: Any) -> Tensor:
    student, teacher = (xs[0] if len(xs) == 1 else xs for xs in case[:2])
    return reference.soft_cross_entropy(student, teacher, case.center, row_weight=case.row_weight, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("views", VIEWS)
def test_the_public_reference_is_the_definition(views: str, reduction: str) -> None:
    for weighted in (False, True):
        case = small_case(views, weighted=weighted)
        options: dict[str, Any] = {"reduction": reduction, "teacher_temp": 0.3}
        got, want = (cases.evaluate(f, case, **options) for f in (public_reference, cases.written_out))
        torch.testing.assert_close(got, want)
    leaf = case.student[0].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: public_reference(case._replace(student=[x, *case.student[1:]])), leaf)
    x = torch.randn(2, 3, 9)
    for got, want in zip(reference.softmax_center(x, x[0, :1]), ops.softmax_center(x, x[0, :1])):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("views", VIEWS)
def test_one_graph_with_its_backward(views: str, reduction: str) -> None:
    torch._dynamo.reset()
    case = small_case(views, weighted=True)
    compiled = torch.compile(cases.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    cotangent = torch.randn(cases.ours(case, reduction=reduction).shape)
    got, want = (cases.evaluate(f, case, cotangent, reduction=reduction) for f in (compiled, cases.ours))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_compiled_by_inductor_and_exported(dtype: torch.dtype) -> None:
    """In place falls back to the ordinary way in a graph."""
    torch._dynamo.reset()
    case = small_case(dtype=dtype)

    def step(case: Case) -> Tensor:
        logits = case._replace(student=[2 * x for x in case.student])
        loss, mean = cases.ours(logits, inplace=True, return_center=True)
        p, _ = ops.softmax_center(case.teacher[0], mean)
        return loss + p.mean()

    compiled = torch.compile(step, fullgraph=True)
    got, want = (cases.evaluate(f, case, torch.tensor(3.0)) for f in (compiled, step))
    torch.testing.assert_close(got, want)

    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return ops.soft_cross_entropy(student, teacher, reduction="none")

    arguments = (case.student[0], case.teacher[0])
    torch.testing.assert_close(torch.export.export(Module(), arguments).module()(*arguments), Module()(*arguments))


# how the kernel cuts its work


@pytest.mark.parametrize("shape", [(6, 2, 5), (10, 2, 1), (3, 1, 5), (None, 1, 33)], ids=str)
def test_threads(shape: tuple[int | None, int, int], threads: int) -> None:
    """Samples in the middle of which a thread begins; right with one and with two, and the same bits when run again."""
    students, teachers, batch = shape
    case = random_case(students, teachers, batch, 30011, weighted=True)
    assert ((students or 1) + teachers) * batch * 30011 * 32 > 2 * 4e6
    for reduction in ("mean", "none"):
        cotangent = torch.randn(cases.ours(case, reduction=reduction).shape)
        check(case, cotangent, reduction=reduction)
        first, again = (cases.evaluate(cases.ours, case, cotangent, reduction=reduction) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1][0], again[1][0])
        mean = cases.ours(case, reduction=reduction, return_center=True)[1]
        torch.testing.assert_close(mean, case.teacher[0].reshape(-1, 30011).double().mean(0).float())
    rows = case.teacher[0].reshape(-1, 30011)
    p, mean = ops.softmax_center(rows, case.center)
    torch.testing.assert_close(p, torch.softmax((rows - case.center) / 0.04, -1), rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(mean, rows.double().mean(0).float())


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_that_goes_past_the_caches(dtype: torch.dtype) -> None:
    """More than 16 MiB of it; rows that begin anywhere in a line of memory."""
    case = random_case(5, 1, 2, 2**24 // torch.finfo(dtype).bits + 3, dtypes=(dtype, dtype))
    assert case.student[0].numel() * case.student[0].element_size() > 2**24
    small = case._replace(student=[case.student[0][i] for i in range(5)])
    want = cases.evaluate(cases.ours, small, reduction="none", exclude_same_view=False)[1]
    (got,) = cases.evaluate(cases.ours, case, reduction="sum", exclude_same_view=False)[1]
    # rounded to 16 bits on the way, for float16 at another scale
    rtol, atol = {F32: (0.0, 0.0), torch.bfloat16: (2**-7, 0.0), torch.float16: (2**-10, 2**-24)}[dtype]
    torch.testing.assert_close(got, torch.stack(want), rtol=rtol, atol=atol)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved only where it is touched")
def test_offsets_beyond_32_bits() -> None:
    step, width = 2**30, 33
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * (4 * step + width), flags=flags)
    far = torch.frombuffer(memory, dtype=F32).as_strided((3, 2, width), (step, 2 * step, 1))
    far.copy_(torch.randn(3, 2, width))
    near = far.contiguous()
    for reduction in ("mean", "none"):
        got, want = (ops.soft_cross_entropy(x, x[1:], reduction=reduction) for x in (far, near))
        assert torch.equal(got, want)
    for got, want in zip(ops.softmax_center(far[:, 0]), ops.softmax_center(near[:, 0])):
        assert torch.equal(got, want)


def test_denormals_are_as_they_were_after_a_call() -> None:
    """The kernel rounds them to zero while it runs; the caller's thread does not."""
    tiny = torch.tensor([1e-38])
    cases.ours(random_case(3, 2, 2, 65))
    assert (tiny * 0.1).item() > 0


@built
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
def test_each_instruction_set(dtype: torch.dtype, level: int) -> None:
    for center in ("none", "each"):
        case = random_case(4, 3, 2, 2083, dtypes=(dtype, dtype), center=center)
        for reduction in ("mean", "none"):
            check(case, torch.ones(4, 2) if reduction == "none" else None, reduction=reduction)
        p, _ = ops.softmax_center(case.teacher[0], None, 0.1)
        rtol = 1e-12 if dtype == F64 else 2e-5
        torch.testing.assert_close(p.double(), torch.softmax(case.teacher[0].double() / 0.1, -1), rtol=rtol, atol=0.0)
