# SPDX-License-Identifier: Apache-2.0
"""The correlation ops in autograd and the compiler, beside their reference, and again with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from correlation_cases import OPS, REFERENCES, SCALARS, evaluate, views
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import _registry

CORRELATION = [n for n in _registry.OPS if n.startswith(("standardize", "product_", "two_view_co"))]
GRAM, FEATURE = (4, 9), (7, 5)  # N <= D / 2, and not


@pytest.mark.parametrize("shape", [GRAM, FEATURE], ids=["gram space", "feature space"])
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name: str, shape: tuple[int, int]) -> None:
    xs = views(*shape, OPS[name].views, dtype=torch.float64)
    assert torch.autograd.gradcheck(OPS[name].ours, [x.requires_grad_() for x in xs])


@pytest.mark.parametrize("shape", [GRAM, FEATURE], ids=["gram space", "feature space"])
def test_gradcheck_of_unlike_widths_and_other_options(shape: tuple[int, int]) -> None:
    x, y = (z.requires_grad_() for z in views(*shape, dtype=torch.float64))
    narrow = torch.randn(shape[0], 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.product_frobenius, (x, narrow))
    assert torch.autograd.gradcheck(ops.product_frobenius, (narrow, x))
    assert torch.autograd.gradcheck(lambda x, y: ops.two_view_correlation(x, y, 0.3, 0.1), (x, y))
    weights: dict[str, Any] = {"invariance": 2.0, "variance": 3.0, "covariance": 4.0, "gamma": 0.8, "eps": 0.1}
    assert torch.autograd.gradcheck(lambda x, y: ops.two_view_covariance(x, y, **weights), (x, y))


@pytest.mark.parametrize("shape", [GRAM, FEATURE], ids=["gram space", "feature space"])
@pytest.mark.parametrize("name", [n for n in SCALARS if OPS[n].views == 2])
def test_a_view_that_needs_no_gradient_gets_none(name: str, shape: tuple[int, int]) -> None:
    op, (x, y) = OPS[name].ours, views(*shape)
    value, dx, dy = evaluate(op, (x, y))
    assert torch.equal(torch.autograd.grad(op(a := x.clone().requires_grad_(), y), a)[0], dx)
    torch.testing.assert_close(torch.autograd.grad(op(x, b := y.clone().requires_grad_()), b)[0], dy)
    assert torch.equal(op(x, y), value) and not op(x, y).requires_grad


@pytest.mark.parametrize("name", CORRELATION)
def test_no_gradient_is_made_where_nobody_asks(name: str) -> None:
    for arguments in samples()[name]:
        if name.startswith("standardize"):
            continue
        _, *grads = getattr(torch.ops.sslkernels, name)(*arguments[:-1], [False, False])
        assert all(g.numel() == 0 for g in grads)


@pytest.mark.parametrize("name", OPS)
def test_double_backward_is_refused(name: str) -> None:
    xs = [x.requires_grad_() for x in views(*FEATURE, OPS[name].views)]
    value = OPS[name].ours(*xs)
    (grad,) = torch.autograd.grad(value * value, xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported; use sslkernels\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize("upstream", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("name", SCALARS)
def test_upstream_gradient(name: str, upstream: float) -> None:
    for dtype in (torch.float32, torch.float16):
        xs = views(*GRAM, OPS[name].views, dtype=dtype)
        _, *once = evaluate(OPS[name].ours, xs)
        _, *scaled = evaluate(lambda *z: upstream * OPS[name].ours(*z), xs)
        for got, want in zip(scaled, once):
            torch.testing.assert_close(got, upstream * want)


@pytest.mark.parametrize("shape", [(64, 512), (512, 64)], ids=["gram space", "feature space"])
def test_half_precision_gradients_do_not_underflow_before_they_are_scaled(shape: tuple[int, int]) -> None:
    """A gradient scaler multiplies the loss: the emitted gradient waits in float32."""
    xs = tuple(2048 * x for x in views(*shape, dtype=torch.float16))
    scale = 2.0**16
    exact = evaluate(OPS["two_view_correlation"].written_out, [x.double() for x in xs])[1] * scale
    grad = evaluate(lambda x, y: ops.two_view_correlation(x, y) * scale, xs)[1]
    assert (exact / scale).abs().median() < 2**-14  # most are denormal in float16
    assert (grad.double() - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("name", OPS)
def test_autocast_leaves_the_arithmetic_in_float32(name: str) -> None:
    xs = views(*GRAM, OPS[name].views)
    for function in (OPS[name].ours, REFERENCES[name]):
        plain = evaluate(function, xs)
        leaves = [x.clone().requires_grad_() for x in xs]
        with torch.autocast("cpu", torch.bfloat16):
            value = function(*leaves)
        for got, want in zip([value, *torch.autograd.grad(value, leaves)], plain):
            assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(300, 1000), (700, 400), (2000, 24)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_same_bits_again(name: str, shape: tuple[int, int], threads: int) -> None:
    xs = views(*shape, OPS[name].views)
    first, again = (evaluate(OPS[name].ours, xs) for _ in range(2))
    for x, y in zip(first, again):
        assert torch.equal(x, y)


# the dispatcher and the compiler


def samples() -> dict[str, list[tuple]]:
    """Arguments of every op of the family, as the public functions pass them."""
    out: dict[str, list[tuple]] = {name: [] for name in CORRELATION}
    for shape in (GRAM, FEATURE):
        for dtypes in ((torch.float32, torch.float32), (torch.float64, torch.float32), (torch.bfloat16, torch.float16)):
            x, y = (z.to(dtype) for z, dtype in zip(views(*shape), dtypes))
            for unbiased in (False, True):
                out["standardize"].append((x, 1e-5, unbiased))
                moments = torch.ops.sslkernels.standardize(x, 1e-5, unbiased)[1]
                out["standardize_backward"].append((torch.randn(shape).to(x.dtype), x, moments, unbiased))
            for mask in ([True, True], [True, False], [False, True], [False, False]):
                out["two_view_correlation"].append((x, y, 5e-3, 1e-5, mask))
                out["two_view_covariance"].append((x, y, (25.0, 12.5, 1.0), 1.0, 1e-4, mask))
                out["product_frobenius"].append((x, y, True, mask))
                out["product_frobenius"].append((x, y[:, :2], False, mask))
            out["product_frobenius"].append((x, None, True, [True, False]))
    return out


def test_samples_name_every_op() -> None:
    assert all(samples()[name] for name in CORRELATION) and len(CORRELATION) == 5


@pytest.mark.parametrize("name", CORRELATION)
def test_opcheck(name: str) -> None:
    for arguments in samples()[name][::3]:
        leaves = [
            a.clone().requires_grad_() if isinstance(a, Tensor) and name != "standardize_backward" else a
            for a in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.sslkernels, name).default, tuple(leaves))


@pytest.mark.parametrize("name", CORRELATION)
def test_the_reference_gives_what_the_kernel_gives(name: str) -> None:
    op = getattr(torch.ops.sslkernels, name).default
    for arguments in samples()[name]:
        with torch.no_grad():
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
            got, want = op(*arguments), op.redispatch(key, *arguments)
        got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
            if name == "standardize" and x.shape == (3, x.shape[-1]):
                x, y = torch.stack([x[0] + x[1], x[2]]), torch.stack([y[0] + y[1], y[2]])  # a mean in two parts
            torch.testing.assert_close(x, y, rtol=2e-2 if x.itemsize == 2 else 2e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [GRAM, FEATURE], ids=["gram space", "feature space"])
@pytest.mark.parametrize("name", OPS)
def test_the_public_reference_is_the_definition(name: str, shape: tuple[int, int]) -> None:
    xs = views(*shape, OPS[name].views, dtype=torch.float64)
    for got, want in zip(evaluate(REFERENCES[name], xs), evaluate(OPS[name].written_out, xs)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPS)
def test_one_graph_with_its_backward(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(OPS[name].ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in (GRAM, FEATURE):
        xs = views(*shape, OPS[name].views)
        for got, want in zip(evaluate(compiled, xs), evaluate(OPS[name].ours, xs)):
            torch.testing.assert_close(got, want)


def test_compiled_by_inductor_and_exported() -> None:
    torch._dynamo.reset()

    def step(x: Tensor, y: Tensor) -> Tensor:
        z = ops.standardize(2 * x)
        return ops.two_view_correlation(z, y) + ops.two_view_covariance(x, 3 * y) + ops.product_frobenius(z)

    xs = views(*GRAM)
    for got, want in zip(evaluate(torch.compile(step, fullgraph=True), xs), evaluate(step, xs)):
        torch.testing.assert_close(got, want)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return step(x, y)

    exported = torch.export.export(Module(), xs).module()
    torch.testing.assert_close(exported(*xs), step(*xs))
