# SPDX-License-Identifier: Apache-2.0
"""The redundancy-reduction losses as modules: what lightly's users write, state, compilation, what they refuse."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import correlation_formulas as formula
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sslkernels import losses

N, D = 12, 20
F64 = torch.float64


def views(n: int = N, d: int = D) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, requires_grad=True), torch.randn(n, d, requires_grad=True)


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "BarlowTwinsLoss": lambda: (losses.BarlowTwinsLoss(), views()),
    "VICRegLoss": lambda: (losses.VICRegLoss(), views()),
    "VICRegLoss paper": lambda: (losses.VICRegLoss(1.0, 2.0, 3.0, variant="paper"), views()),
    "TiCoLoss": lambda: (losses.TiCoLoss(), views()),
    "TiCoLoss through": lambda: (losses.TiCoLoss(0.5, through_batch=True), views()),
    "FroSSLLoss": lambda: (losses.FroSSLLoss(0.5), ([*views(), views()[0]],)),
}


def run(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    loss = module(*args)
    leaves = args[0] if isinstance(args[0], list) else args
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


class TestMigration:
    """Their import changed, nothing else: positional arguments and defaults as in lightly."""

    def test_barlow_twins(self) -> None:
        a, b = (x.double() for x in views())
        torch.testing.assert_close(losses.BarlowTwinsLoss()(a, b), formula.barlow_twins(a, b, 5e-3))
        torch.testing.assert_close(losses.BarlowTwinsLoss(0.1, False)(a, b), formula.barlow_twins(a, b, 0.1))

    def test_vicreg(self) -> None:
        a, b = (x.double() for x in views())
        torch.testing.assert_close(losses.VICRegLoss()(a, b), formula.vicreg(a, b))
        value = losses.VICRegLoss(1.0, 2.0, 3.0, False, 0.1)(a, b)
        torch.testing.assert_close(value, formula.vicreg(a, b, 1.0, 2.0, 3.0, 0.1))
        torch.testing.assert_close(losses.VICRegLoss(variant="paper")(a, b), formula.vicreg(a, b, halves=1))

    @pytest.mark.parametrize("through_batch", [False, True])
    def test_tico(self, through_batch: bool) -> None:
        """The covariance moves with every batch, but for those that are only looked at."""
        loss_fn, c = losses.TiCoLoss(0.8, 5.0, False, through_batch=through_batch), torch.zeros(D, D, dtype=F64)
        for update in (True, True, False, True):
            a, b = (x.detach().double().requires_grad_() for x in views())
            value = loss_fn(a, b, update_covariance_matrix=update)
            expected, moved = formula.tico(a, b, c, 0.8, 5.0, through_batch=through_batch)
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)))
            c = moved if update else c
            torch.testing.assert_close(loss_fn.C, c)
        assert not loss_fn.C.requires_grad

    def test_frossl(self) -> None:
        a, b = (x.double() for x in views())
        torch.testing.assert_close(losses.FroSSLLoss()([a, b]), formula.frossl([a, b]))
        torch.testing.assert_close(losses.FroSSLLoss(0.3)([a, b, b + a]), formula.frossl([a, b, b + a], 0.3))


@pytest.mark.parametrize("name", MODULES)
def test_compiled_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()
    module, args = MODULES[name]()
    other = copy.deepcopy(module)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # TiCo: without, then with a covariance
        for x, y in zip(run(compiled, args), run(module, args), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    for x, y in zip(other.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(x, y)


def test_compiled_by_inductor() -> None:
    torch.compiler.reset()
    module, args = MODULES["FroSSLLoss"]()  # the one with the most of plain PyTorch around its op
    for x, y in zip(run(torch.compile(module, fullgraph=True), args), run(module, args), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss", "TiCoLoss"])
def test_compiled_for_any_batch_under_autocast(name: str) -> None:
    torch.compiler.reset()
    module = MODULES[name]()[0]
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    for n in (5, 8, 11):  # the second makes the size symbolic
        args = views(n)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(*args), module(*args))


@pytest.mark.parametrize("name", MODULES)
def test_shapes_on_fakes(name: str) -> None:
    with FakeTensorMode():
        module, args = MODULES[name]()
        for _ in range(2):
            value, *gradients = run(module, args)
        assert value.shape == ()
        assert all(gradient.shape == (N, D) for gradient in gradients)


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip_and_deepcopy(name: str) -> None:
    module, args = MODULES[name]()
    run(module, args)
    fresh, _ = MODULES[name]()
    nn.Sequential(fresh).load_state_dict(nn.Sequential(module).state_dict())
    copied = copy.deepcopy(module)
    expected = run(module, args)
    for other in (fresh, copied):
        assert all(torch.equal(x, y) for x, y in zip(run(other, args), expected, strict=True))


def test_state_of_tico() -> None:
    module, args = MODULES["TiCoLoss"]()
    assert not module.state_dict()
    module.load_state_dict({})  # lightly's state
    run(module, args)
    assert list(module.state_dict()) == ["C"] and module.C.dtype == torch.float32
    module.double()
    assert module.C.dtype == F64
    assert module(*args).dtype == torch.float32
    assert module(*(x.double() for x in args)).dtype == F64
    assert module.C.dtype == F64
    half = losses.TiCoLoss()
    half(*(x.bfloat16() for x in args))
    assert half.C.dtype == torch.float32


def test_tico_keeps_no_graph() -> None:
    """A loss whose backward comes after the next forward, or never, still has its own covariance."""
    module, (a, b) = MODULES["TiCoLoss through"]()
    twin = copy.deepcopy(module)
    first = module(a, b)
    module(b, a)
    twin_first = twin(a, b)
    assert torch.equal(torch.autograd.grad(first, a)[0], torch.autograd.grad(twin_first, a)[0])


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (losses.BarlowTwinsLoss(), "BarlowTwinsLoss(lambda_param=0.005)"),
        (
            losses.VICRegLoss(nu_param=2.0),
            "VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=2.0, eps=0.0001, variant='code')",
        ),
        (losses.TiCoLoss(), "TiCoLoss(beta=0.9, rho=8.0, through_batch=False)"),
        (losses.FroSSLLoss(), "FroSSLLoss(invariance_weight=1.0)"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_repr_names_the_options(module: nn.Module, text: str) -> None:
    assert repr(module) == text


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss", "TiCoLoss"])
def test_gather_distributed_without_other_ranks(name: str) -> None:
    """As lightly's users write it, in a script that may also run as one process."""
    module = getattr(losses, name)
    (a, b), one, all_ranks = views(), module(), module(gather_distributed=True)
    assert torch.equal(all_ranks(a, b), one(a, b))
    assert repr(all_ranks) == repr(one)[:-1] + ", process_group=world)"


def test_options_may_follow_a_schedule() -> None:
    module, (a, b) = MODULES["BarlowTwinsLoss"]()
    module.lambda_param = 0.5
    assert torch.equal(module(a, b), losses.barlow_twins_loss(a, b, 0.5))


A = torch.randn(4, 3)
PAIRS: dict[str, Callable[..., Any]] = {
    "barlow_twins_loss": losses.barlow_twins_loss,
    "vicreg_loss": losses.vicreg_loss,
    "tico_loss": losses.tico_loss,
    "frossl_loss": lambda a, b: losses.frossl_loss([a, b]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_bad_views_are_refused_by_name(name: str) -> None:
    loss = PAIRS[name]
    first, second = ("z_views[0]", "z_views[1]") if name == "frossl_loss" else ("z_a", "z_b")
    for a, b, error, words in (
        (A[:1], A[:1], ValueError, f"{first} must have more than one row, got shape (1, 3)"),
        (A[:0], A[:0], ValueError, f"{first} must not be an empty batch, got shape (0, 3)"),
        (A[:, :0], A[:, :0], ValueError, f"{first} must have at least one feature, got shape (4, 0)"),
        (A, A[:2], ValueError, f"{second} must have the shape of {first} (4, 3), got (2, 3)"),
        (A.long(), A, TypeError, f"{first} must have a floating dtype, got torch.int64"),
        (A, A.to(torch.complex64), TypeError, f"{second} must have a floating dtype"),
        ([1.0], A, TypeError, f"{first} must be a torch.Tensor, got list"),
        (A, None, TypeError, f"{second} must be a torch.Tensor, got NoneType"),
        (A, A.to("meta"), ValueError, f"{second} must be on the device of {first} (cpu), got meta"),
    ):
        with pytest.raises(error, match=re.escape(words)):
            loss(a, b)
    if name != "vicreg_loss":
        with pytest.raises(ValueError, match=re.escape(f"{first} must be 2-D (rows, features), got shape (4, 2, 3)")):
            loss(A[:, None].expand(4, 2, 3), A[:, None].expand(4, 2, 3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: losses.barlow_twins_loss(A, A, -1.0), ValueError, "lambda_param must be in [0.0, inf), got -1.0"),
        (lambda: losses.vicreg_loss(A[0], A[0]), ValueError, "z_a must be (rows, features) or (rows, ..., features)"),
        (lambda: losses.vicreg_loss(A[:, None, None][:, :0], A[:, None, None][:, :0]), ValueError, "one position"),
        (lambda: losses.vicreg_loss(A, A, mu_param=float("nan")), ValueError, "mu_param must be in [0.0, inf)"),
        (lambda: losses.vicreg_loss(A, A, eps=0.0), ValueError, "eps must be positive and finite, got 0.0"),
        (lambda: losses.vicreg_loss(A, A, variant="solo"), ValueError, "variant must be one of 'code', 'paper'"),
        (lambda: losses.tico_loss(A, A, beta=1.0), ValueError, "beta must be in [0.0, 1.0), got 1.0"),
        (lambda: losses.tico_loss(A, A, rho="8"), TypeError, "rho must be a number, got str"),
        (lambda: losses.tico_loss(A, A, A), ValueError, "covariance must have shape (3, 3), got (4, 3)"),
        (lambda: losses.tico_loss(A, A, 1.0), TypeError, "covariance must be a torch.Tensor, got float"),
        (lambda: losses.frossl_loss([A]), ValueError, "z_views must hold at least two views, got 1"),
        (lambda: losses.frossl_loss(A), TypeError, "z_views must be a list of tensors, got Tensor"),
        (lambda: losses.frossl_loss([A, A, A[:2]]), ValueError, "z_views[2] must have the shape of z_views[0] (4, 3)"),
        (lambda: losses.frossl_loss([A, A], -0.5), ValueError, "invariance_weight must be in [0.0, inf), got -0.5"),
        (lambda: losses.BarlowTwinsLoss(float("inf")), ValueError, "lambda_param must be in [0.0, inf), got inf"),
        (lambda: losses.BarlowTwinsLoss(strategy="star"), ValueError, "strategy must be one of 'gather', 'ring'"),
        (lambda: losses.VICRegLoss(nu_param=-1.0), ValueError, "nu_param must be in"),
        (lambda: losses.VICRegLoss(variant="lightly"), ValueError, "variant must be one of"),
        (lambda: losses.TiCoLoss(beta=-0.1), ValueError, "beta must be in"),
        (lambda: losses.FroSSLLoss(None), TypeError, "invariance_weight must be a number, got NoneType"),
    ],
)
def test_bad_options_are_refused_by_name(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()
