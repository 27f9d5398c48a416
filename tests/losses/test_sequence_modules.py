# SPDX-License-Identifier: Apache-2.0
"""The losses over tokens and frames as modules: compilation, autocast, state, repr, repeats, labels out of range."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslkernels import losses

B, T, D, V = 3, 9, 6, 13


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def frames() -> tuple[Tensor, Tensor, Tensor]:
    return leaf(B, T, D), leaf(B, T, D), torch.rand(B, T) < 0.6


def tokens() -> Tensor:
    return torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)


def learned() -> nn.Parameter:
    return nn.Parameter(torch.tensor(0.2))


class Seeded(nn.Module):
    """A wav2vec 2.0 loss with fixed draws."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = losses.Wav2Vec2Loss(8, **options)

    def forward(self, *args: Tensor) -> Any:
        return self.loss(*args, seed=3)


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "MaskedLMLoss": lambda: (losses.MaskedLMLoss(), (leaf(B, T, D), leaf(V, D), tokens(), leaf(V))),
    "MaskedLMLoss all": lambda: (
        losses.MaskedLMLoss(label_smoothing=0.1, z_loss=1e-2, reduction="none"),
        (leaf(B, T, D), leaf(V, D), tokens()),
    ),
    "CausalLMLoss": lambda: (losses.CausalLMLoss(z_loss=1e-3), (leaf(B, T, D), leaf(V, D), tokens())),
    "NextSentenceLoss": lambda: (losses.NextSentenceLoss(), (leaf(B, 2), torch.randint(2, (B,)))),
    "HuBERTLoss": lambda: (losses.HuBERTLoss(), (leaf(B, T, D), leaf(V, D), tokens(), torch.rand(B, T) < 0.5)),
    "HuBERTLoss both": lambda: (
        losses.HuBERTLoss(1.0, 0.5, temperature=learned()),
        (leaf(B, T, D), leaf(V, D), tokens(), torch.rand(B, T) < 0.5),
    ),
    "Wav2Vec2Loss": lambda: (Seeded(), frames()),
    "Wav2Vec2Loss all": lambda: (
        Seeded(temperature=learned()),
        (*frames(), torch.rand(2, 5, requires_grad=True), torch.rand((), requires_grad=True)),
    ),
    "CPCLoss": lambda: (losses.CPCLoss(5, D, 3), (leaf(B, T, 5), leaf(B, T, D))),
    "CPCLoss sequence": lambda: (losses.CPCLoss(5, D, 3, negatives="sequence"), (leaf(B, T, 5), leaf(B, T, D))),
    "CPCLoss rows": lambda: (losses.CPCLoss(5, D, 3, reduction="none"), (leaf(B, T, 5), leaf(B, T, D))),
}


def run(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    loss = module(*args)
    leaves = [x for x in (*args, *module.parameters()) if isinstance(x, Tensor) and x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def check_compiled(name: str, backend: str) -> None:
    torch.compiler.reset()
    module, args = MODULES[name]()
    eager = run(copy.deepcopy(module), args)
    compiled = run(torch.compile(module, backend=backend, fullgraph=True), args)
    for x, y in zip(compiled, eager, strict=True):
        # wav2vec 2.0 sweeps all frames where it may not look at the mask: other sums, the same draws
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_without_a_graph_break(name: str) -> None:
    check_compiled(name, "aot_eager")


def test_compiled_by_inductor() -> None:
    check_compiled("HuBERTLoss", "inductor")


@pytest.mark.parametrize("name", MODULES)
def test_autocast_rounds_features_and_nothing_else(name: str) -> None:
    module, args = MODULES[name]()
    exact = run(module, args)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(*args)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact[0], rtol=3e-2, atol=5e-2)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(rounded.sum(), leaves), exact[1:]):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.parametrize("name", MODULES)
def test_repeats_are_equal_bit_for_bit(name: str, threads: int) -> None:
    module, args = MODULES[name]()
    first = run(module, args)
    for x, y in zip(run(module, args), first, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", MODULES)
def test_strides_do_not_matter(name: str) -> None:
    def strided(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x.detach()
        return wide.mT.contiguous().mT[..., ::2] if x.ndim > 1 else wide[::2]

    module, args = MODULES[name]()
    with torch.no_grad():
        torch.testing.assert_close(module(*(strided(x) for x in args)), module(*args))


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip(name: str) -> None:
    module, args = MODULES[name]()
    for x in module.parameters():
        x.data.add_(0.1)
    other, _ = MODULES[name]()
    other.load_state_dict(module.state_dict())
    for x, y in zip(run(other, args), run(copy.deepcopy(module), args), strict=True):
        assert torch.equal(x, y)


def test_repr_names_the_options() -> None:
    assert repr(losses.MaskedLMLoss(z_loss=0.1)) == (
        "MaskedLMLoss(ignore_index=-100, label_smoothing=0.0, z_loss=0.1, reduction=mean)"
    )
    assert repr(losses.HuBERTLoss()) == (
        "HuBERTLoss(temperature=0.1, pred_masked_weight=1.0, pred_nomask_weight=0.0, ignore_index=-100, reduction=mean)"
    )
    assert repr(losses.Wav2Vec2Loss()) == (
        "Wav2Vec2Loss(temperature=0.1, num_negatives=100, diversity_weight=0.1, penalty_weight=10.0)"
    )
    assert repr(losses.CPCLoss(4, 6)) == "CPCLoss(context_dim=4, dim=6, steps=12, negatives=batch, reduction=mean)"


def test_a_label_out_of_range_is_nan_in_a_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(losses.NextSentenceLoss(reduction="none"), backend="aot_eager", fullgraph=True)
    rows = compiled(torch.randn(3, 2), torch.tensor([0, 5, 1]))
    assert rows.isnan().tolist() == [False, True, False]
