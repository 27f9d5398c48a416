# SPDX-License-Identifier: Apache-2.0
"""The regression ops in autograd and the compiler, on one and two threads, on each instruction set."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pytest
import regression_cases as cases
import torch
from regression_cases import COSINES, LOSSES, check, random_case
from torch import Tensor

from sslkernels import _library, ops
from sslkernels.ops import _registry
from sslkernels.reference import regression as reference

REGRESSION = [name for name in _registry.OPS if name.startswith("masked_regression") or name == "average_layers"]
ROWS = ("ids", "mask", "all")
built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


def small_case(rows: str, dtype: torch.dtype = torch.float64) -> cases.Case:
    case = random_case((2, 2, 3), 7, 5, rows=rows, dtypes=(dtype, dtype))
    if case.mask is not None:
        case.mask.view(-1)[0] = True
    return case


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, rows: str, reduction: str) -> None:
    case = small_case(rows)
    options: dict[str, Any] = {"loss": loss, "reduction": reduction, "normalize_target": loss not in COSINES}

    def function(pred: Tensor) -> Tensor:
        return cases.ours(case._replace(pred=pred), **options)

    assert torch.autograd.gradcheck(function, case.pred.requires_grad_())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction: str) -> None:
    case = small_case("ids")
    loss = cases.ours(case._replace(pred=case.pred.requires_grad_()), reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss * loss, case.pred, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported; use sslkernels\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 2.0, -0.5])
def test_upstream_gradient(upstream: float, reduction: str) -> None:
    """As it is where it is one; else times what came, in every dtype."""
    for dtype in (torch.float32, torch.float16):
        case = small_case("ids", dtype)
        once = cases.evaluate(cases.ours, case, reduction=reduction)[1]
        leaf = case.pred.clone().requires_grad_()
        (upstream * cases.ours(case._replace(pred=leaf), reduction=reduction)).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, once * upstream)


def test_half_precision_gradients_do_not_underflow_before_they_are_scaled() -> None:
    """A gradient scaler multiplies the loss: the emitted gradient waits in float32."""
    case = random_case((64, 4, 8), 16, 64, dtypes=(torch.float16, torch.float16))
    leaf = case.pred.clone().requires_grad_()
    scale = 2.0**16
    (cases.ours(case._replace(pred=leaf)) * scale).backward()
    exact = cases.evaluate(cases.written_out, case.to(torch.float64))[1]
    assert exact.abs().max() < 2**-14  # denormal in float16
    assert leaf.grad is not None
    assert (leaf.grad.double() - exact * scale).norm() <= 1e-3 * (exact * scale).norm()


def test_the_target_is_a_constant() -> None:
    case = small_case("ids")
    target = case.target.requires_grad_()
    for reduction in ("mean", "none"):
        loss = cases.ours(case._replace(pred=case.pred.requires_grad_()), reduction=reduction).sum()
        assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None
    assert not cases.ours(case._replace(pred=case.pred.detach())).requires_grad
    layer = torch.randn(2, 4, 3, requires_grad=True)
    assert not ops.average_layers([layer, layer]).requires_grad


def test_the_target_may_change_before_backward() -> None:
    """The mean has kept neither pred's values nor the target."""
    case = small_case("ids")
    expected = cases.evaluate(cases.ours, case)[1]
    loss = cases.ours(case._replace(pred=case.pred.requires_grad_()))
    case.target.zero_()
    assert torch.equal(torch.autograd.grad(loss, case.pred)[0], expected)


def test_no_gradient_is_made_where_nobody_asks() -> None:
    case = small_case("ids")
    arguments = (case.pred, case.target, case.ids, "l2", 1.0, False, 1e-5, 1.0, True)
    assert torch.ops.sslkernels.masked_regression(*arguments, False)[1].numel() == 0
    with torch.no_grad():
        assert not cases.ours(case._replace(pred=case.pred.requires_grad_())).requires_grad


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_autocast_leaves_the_arithmetic_in_float32(loss: str) -> None:
    case = small_case("ids", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cases.ours(case, loss=loss), cases.ours(case, loss=loss))
    assert cases.ours(small_case("ids", torch.bfloat16), loss=loss).dtype == torch.float32


# what the dispatcher and the compiler see


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each op: every loss, ids, mask and neither, with gradient and without, 16 bits."""
    out: dict[str, list[tuple[Any, ...]]] = {name: [] for name in REGRESSION}
    pairs = [("ids", loss) for loss in LOSSES] + [("mask", "smooth_l1"), ("all", "cosine")]
    for rows, loss in pairs:
        dtype = torch.bfloat16 if loss == "l2" else torch.float32
        case = small_case(rows, dtype)
        index = case.ids if case.ids is not None else case.mask
        options = (index, loss, 0.5, loss == "l1", 1e-5)
        pred = case.pred.requires_grad_(loss != "l1")
        out["masked_regression"].append((pred, case.target, *options, 2.0, rows != "all", pred.requires_grad))
        out["masked_regression_rows"].append((pred, case.target, *options))
        grad = torch.randn(case.pred.shape[:-1])
        out["masked_regression_rows_backward"].append((grad, case.pred.detach(), case.target, *options))
    layers = [torch.randn(2, 5, 3), torch.randn(2, 5, 3).bfloat16()]
    out["average_layers"] = [(layers, *flags, 1e-5) for flags in ((True, True), (True, False), (False, True))]
    return out


@pytest.mark.parametrize("name", REGRESSION)
def test_opcheck(name: str) -> None:
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.sslkernels, name).default, arguments)


def fallback(name: str, *arguments: Any) -> Any:
    op = getattr(torch.ops.sslkernels, name).default
    with torch.no_grad():
        return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *arguments)


@pytest.mark.parametrize("name", REGRESSION)
def test_the_reference_gives_what_the_kernel_gives(name: str) -> None:
    for arguments in samples()[name]:
        with torch.no_grad():
            got, want = getattr(torch.ops.sslkernels, name).default(*arguments), fallback(name, *arguments)
        got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", [-1, 7])
@pytest.mark.parametrize("normalize_target", [True, False])
def test_an_id_outside_the_target_makes_its_row_nan_where_values_are_not_read(bad: int, normalize_target: bool) -> None:
    case = small_case("ids")
    assert case.ids is not None
    case.ids[1, 0, 2] = bad
    options = ("l2", 1.0, normalize_target, 1e-5)
    rows = fallback("masked_regression_rows", case.pred, case.target, case.ids, *options)
    assert rows[1, 0, 2].isnan() and rows.isnan().sum() == 1
    loss, dpred = fallback("masked_regression", case.pred, case.target, case.ids, *options, 1.0, True, True)
    assert loss.isnan() and dpred.isnan().any(-1).sum() == 1
    nothing = fallback("masked_regression_rows", case.pred, case.target[:, :0], case.ids, *options)
    assert nothing.isnan().all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_public_reference_is_the_definition(loss: str, rows: str) -> None:
    case = small_case(rows)
    for reduction in ("mean", "sum", "none"):
        options: dict[str, Any] = {"loss": loss, "reduction": reduction, "beta": 0.5, "scale": 2.0}

        def function(c: cases.Case, **o: Any) -> Tensor:
            return reference.masked_regression(c.pred, c.target, c.ids, mask=c.mask, **o)

        torch.testing.assert_close(
            cases.evaluate(function, case, **options), cases.evaluate(cases.written_out, case, **options)
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", ROWS)
def test_one_graph_with_its_backward(rows: str, reduction: str) -> None:
    torch._dynamo.reset()
    case = small_case(rows)
    options: dict[str, Any] = {"normalize_target": True, "reduction": reduction}
    compiled = torch.compile(cases.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    cotangent = torch.randn(2, 2, 3) if reduction == "none" else None
    torch.testing.assert_close(
        cases.evaluate(compiled, case, cotangent, **options), cases.evaluate(cases.ours, case, cotangent, **options)
    )


def test_compiled_by_inductor_and_exported() -> None:
    torch._dynamo.reset()
    case = small_case("ids", torch.float32)
    layers = [torch.randn(2, 7, 5) for _ in range(3)]

    def step(case: cases.Case) -> Tensor:
        target = ops.average_layers(layers, layer_norm=True)
        return ops.masked_regression(2 * case.pred, target, case.ids, loss="l2", scale=5**0.5)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(cases.evaluate(compiled, case), cases.evaluate(step, case))

    class Module(torch.nn.Module):
        def forward(self, pred: Tensor, target: Tensor, ids: Tensor) -> Tensor:
            return ops.masked_regression(pred, target, ids, normalize_target=True)

    arguments = (case.pred, case.target, case.ids)
    exported = torch.export.export(Module(), arguments).module()
    torch.testing.assert_close(exported(*arguments), Module()(*arguments))


# how the kernel cuts its work


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_threads(loss: str, rows: str, threads: int) -> None:
    """Enough rows for two threads; right with one and with two, and the same bits when run again."""
    case = random_case((4, 3, 101), 301, 257, rows=rows)
    assert case.pred.numel() * 32 > 2 * 4e6
    options: dict[str, Any] = {"loss": loss, "normalize_target": loss == "smooth_l1"}
    for reduction in ("mean", "none"):
        cotangent = torch.randn(4, 3, 101) if reduction == "none" else None
        check(case, cotangent, reduction=reduction, **options)
        first, again = (cases.evaluate(cases.ours, case, cotangent, reduction=reduction, **options) for _ in range(2))
        for x, y in zip(first, again):
            assert torch.equal(x, y)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_instruction_set(loss: str, dtype: torch.dtype, level: int) -> None:
    for normalize in (False, True)[: 1 if loss in COSINES else 2]:
        check(random_case((3, 5), 9, 83, dtypes=(dtype, dtype)), loss=loss, normalize_target=normalize)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved only where it is touched")
def test_offsets_beyond_32_bits() -> None:
    step, rows, width = 2**30, 4, 16
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * (step * (rows - 1) + width), flags=flags)
    far = torch.frombuffer(memory, dtype=torch.float32).as_strided((1, rows, width), (0, step, 1))
    far.copy_(torch.randn(1, rows, width))
    ids = torch.tensor([[3, 0, 2]])
    pred = torch.randn(1, 3, width)
    got = ops.masked_regression(pred, far, ids, reduction="none")
    assert torch.equal(got, ops.masked_regression(pred, far.contiguous(), ids, reduction="none"))
    layer = ops.average_layers([far])
    assert torch.equal(layer, ops.average_layers([far.contiguous()]))
