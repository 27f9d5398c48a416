# SPDX-License-Identifier: Apache-2.0
"""The losses as modules: what a user of lightly, open_clip or pytorch-metric-learning writes, state, compilation."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import loss_formulas as formula
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import losses
from sslkernels.losses import MemoryQueue

N, D, SIZE = 8, 6, 20


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=formula.bound(torch.float64, 20), atol=0)


class TestMigration:
    """Their import changed, nothing else: positional arguments and defaults as there."""

    def test_lightly_nt_xent(self) -> None:
        out0, out1 = randn(N, D), randn(N, D)
        same(losses.NTXentLoss()(out0, out1), formula.nt_xent(out0, out1, 0.5))
        same(losses.NTXentLoss(0.1, 0, False)(out0, out1), formula.nt_xent(out0, out1, 0.1))

    def test_lightly_nt_xent_with_a_memory_bank(self) -> None:
        """Negatives are the bank before this batch; out1 joins it where out0 requires a gradient."""
        loss_fn = losses.NTXentLoss(temperature=0.2, memory_bank_size=(SIZE, D)).double()
        bank = loss_fn.memory_bank.keys.clone()
        for step in range(4):
            out0, out1 = randn(N, D).requires_grad_(), randn(N, D)
            logits = torch.cat(
                [(formula.unit(out0) * formula.unit(out1)).sum(1, keepdim=True), formula.unit(out0) @ bank.T], 1
            )
            expected = F.cross_entropy(logits / 0.2, torch.zeros(N, dtype=torch.long))
            value = loss_fn(out0, out1)
            same(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value, out0), torch.autograd.grad(expected, out0))
            rows = torch.arange(step * N, (step + 1) * N) % SIZE
            bank[rows] = formula.unit(out1)
            torch.testing.assert_close(loss_fn.memory_bank.keys, bank)
        loss_fn(out0.detach(), out1)
        torch.testing.assert_close(loss_fn.memory_bank.keys, bank)

    def test_lightly_nt_xent_with_a_memory_bank_of_unknown_width(self) -> None:
        with pytest.warns(UserWarning, match="memory_bank_size=20 has no dim"):
            loss_fn = losses.NTXentLoss(memory_bank_size=SIZE)
        loss_fn(torch.randn(N, D, requires_grad=True), torch.randn(N, D))
        assert loss_fn.memory_bank.keys.shape == (SIZE, D)
        assert loss_fn.memory_bank.pointer == N

    def test_lightly_dcl(self) -> None:
        out0, out1 = randn(N, D), randn(N, D)
        same(losses.DCLLoss()(out0, out1), formula.dcl(out0, out1, 0.1))

        def weight_fn(a: Tensor, b: Tensor) -> Tensor:
            return torch.sum((a - b) ** 2, dim=1)

        same(losses.DCLLoss(0.5, weight_fn, False)(out0, out1), formula.dcl(out0, out1, 0.5, weight_fn))

    def test_lightly_dclw(self) -> None:
        def weights(a: Tensor, b: Tensor) -> Tensor:
            return 2 - N * F.softmax((a * b).sum(1) / 0.3, dim=0)

        out0, out1 = randn(N, D).requires_grad_(), randn(N, D)
        value = losses.DCLWLoss(0.5, 0.3)(out0, out1)
        expected = formula.dcl(out0, out1, 0.5, lambda a, b: weights(a, b).detach())
        same(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, out0), torch.autograd.grad(expected, out0))

    @pytest.mark.parametrize(
        ("module", "expected"), [(losses.ClipLoss(), formula.clip), (losses.SigLipLoss(), formula.siglip)]
    )
    def test_open_clip(self, module: nn.Module, expected: Callable[..., Tensor]) -> None:
        image, text = formula.unit(randn(N, D)), formula.unit(randn(N, D))
        scale, bias = torch.tensor(10.0).double(), torch.tensor(-3.0).double()
        value = expected(image, text, scale, bias)
        same(module(image, text, scale, bias), value)
        same(module(image, text, scale, logit_bias=bias, output_dict=True)["contrastive_loss"], value)
        found, stats = module(image, text, scale, bias, True, return_stats=True)
        same(found["contrastive_loss"], value)
        assert set(stats) == {"top1", "positive", "hardest_negative"}

    def test_pytorch_metric_learning_supcon(self) -> None:
        """Its reducer takes the mean over the rows that are not zero: those with a positive."""
        embeddings, labels = randn(N, D), torch.tensor([0, 1, 0, 2, 1, 0, 3, 1])
        s, same_label = formula.unit(embeddings) @ formula.unit(embeddings).T / 0.1, labels[:, None] == labels
        log_prob = s - s.masked_fill(formula.eye(N), -math.inf).logsumexp(1, keepdim=True)
        positive = same_label & ~formula.eye(N)
        rows = -(positive * log_prob).sum(1) / (positive.sum(1) + torch.finfo(torch.float64).tiny)
        same(losses.SupConLoss(temperature=0.1)(embeddings, labels), rows[rows > 0].mean())

    def test_authors_of_supcon(self) -> None:
        """Features (B, V, D); their code multiplies by temperature / base_temperature, which is 1 at 0.07."""
        features, labels = formula.unit(randn(5, 2, D)), torch.tensor([0, 1, 0, 1, 2])
        flat, again = torch.cat(torch.unbind(features, dim=1)), labels.repeat(2)
        same(losses.SupConLoss(temperature=0.07)(features, labels), formula.supcon(flat, again, 0.07))
        same(losses.SupConLoss(temperature=0.07)(features), formula.supcon(flat, torch.arange(5).repeat(2), 0.07))

    def test_info_nce_pytorch(self) -> None:
        query, key, negatives = randn(N, D), randn(N, D), randn(SIZE, D)
        same(losses.InfoNCELoss()(query, key), formula.info_nce(query, key, None, 0.1))
        same(losses.InfoNCELoss(0.3)(query, key, negatives), formula.info_nce(query, key, negatives, 0.3))


def learned(x: float = 0.3) -> nn.Parameter:
    return nn.Parameter(torch.tensor(x))


def twice(a: Tensor, b: Tensor) -> Tensor:
    return 1 + (a * b).sum(1)


# a module, and the arguments of its forward; a fresh one each time
MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "NTXentLoss": lambda: (losses.NTXentLoss(), views()),
    "NTXentLoss learned": lambda: (losses.NTXentLoss(learned(), label_smoothing=0.1), views()),
    "NTXentLoss hard": lambda: (losses.NTXentLoss(beta=1.0, tau_plus=0.1, reduction="none"), views()),
    "NTXentLoss bank": lambda: (losses.NTXentLoss(memory_bank_size=(SIZE, D)), views()),
    "InfoNCELoss": lambda: (losses.InfoNCELoss(), views()),
    "InfoNCELoss shared": lambda: (losses.InfoNCELoss(learned()), (*views(), MemoryQueue(SIZE, D).keys)),
    "InfoNCELoss both": lambda: (losses.InfoNCELoss(in_batch=True, normalize=False), (*views(), torch.randn(SIZE, D))),
    "InfoNCELoss own": lambda: (losses.InfoNCELoss(), (*views(), torch.randn(N, 3, D, requires_grad=True))),
    "ClipLoss": lambda: (losses.ClipLoss(), (*views(), learned(2.0), learned(-1.0))),
    "SigLipLoss": lambda: (losses.SigLipLoss(label_smoothing=0.1), (*views(), learned(2.0), learned(-1.0))),
    "SupConLoss": lambda: (losses.SupConLoss(), (views()[0], torch.randint(3, (N,)))),
    "SupConLoss views": lambda: (losses.SupConLoss(learned()), (torch.randn(N, 2, D, requires_grad=True),)),
    "DCLLoss": lambda: (losses.DCLLoss(weight_fn=twice), views()),
    "DCLWLoss": lambda: (losses.DCLWLoss(), views()),
}


def views() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def run(module: nn.Module, args: tuple[Any, ...], **options: Any) -> list[Tensor]:
    """The loss, statistics and the gradient of every leaf, in one backward."""
    result = module(*args, **options)
    loss, stats = result if isinstance(result, tuple) else (result, {})
    leaves = [x for x in (*args, *module.parameters()) if isinstance(x, Tensor) and x.requires_grad]
    return [loss.detach(), *stats.values(), *torch.autograd.grad(loss.sum(), leaves)]


def check_compiled(name: str, backend: str, **options: Any) -> None:
    torch.compiler.reset()
    module, args = MODULES[name]()
    eager = run(copy.deepcopy(module), args, **options)
    compiled = run(torch.compile(module, backend=backend, fullgraph=True), args, **options)
    assert len(eager) == len(compiled)
    for x, y in zip(compiled, eager):
        # the same kernels: what differs is how the O(N D) parts around them are fused
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_without_a_graph_break(name: str) -> None:
    check_compiled(name, "aot_eager", return_stats=True)


def test_compiled_by_inductor() -> None:
    check_compiled("NTXentLoss learned", "inductor", sample_weight=torch.rand(N))


@pytest.mark.parametrize(
    "loss",
    [
        losses.nt_xent,
        losses.dcl,
        losses.info_nce,  # 1 / N is the weight of a row
        lambda a, b: losses.clip_loss(a, b, 2.0),
        lambda a, b: losses.siglip_loss(a, b, 2.0, -1.0),
        lambda a, b: losses.supcon(torch.stack([a, b], 1)),
    ],
    ids=["nt_xent", "dcl", "info_nce", "clip", "siglip", "supcon"],
)
def test_compiled_for_any_batch(loss: Callable[..., Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (5, 8, 11):  # the second makes the size symbolic
        a, b = torch.randn(n, D), torch.randn(n, D)
        torch.testing.assert_close(compiled(a, b), loss(a, b))


def test_compiled_with_a_temperature_that_follows_a_schedule() -> None:
    torch.compiler.reset()
    module, (a, b) = losses.NTXentLoss(0.5), views()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for temperature in (0.5, 0.4, 0.3):  # the second makes it symbolic
        module.temperature = temperature
        torch.testing.assert_close(compiled(a, b), losses.nt_xent(a, b, temperature))


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip_and_deepcopy(name: str) -> None:
    module, args = MODULES[name]()
    for x in [*module.parameters(), *module.buffers()]:
        x.data.add_(1)
    other, _ = MODULES[name]()
    other.load_state_dict(module.state_dict())
    expected = run(copy.deepcopy(module), args)
    for x, y in zip(run(other, args), expected):
        assert torch.equal(x, y)


def test_a_bank_of_unknown_width_is_restored_before_the_first_batch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = losses.NTXentLoss(memory_bank_size=SIZE), losses.NTXentLoss(memory_bank_size=SIZE)
    first(*views())
    nn.Sequential(second).load_state_dict(nn.Sequential(first).state_dict())
    assert torch.equal(second.memory_bank.keys, first.memory_bank.keys)
    assert second.memory_bank.pointer == N


def test_a_learned_temperature_is_a_parameter_that_learns() -> None:
    module = losses.NTXentLoss(learned(0.5))
    a = torch.randn(N, D)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    before = module(a, a + 0.1 * torch.randn(N, D))
    before.backward()
    optimizer.step()
    assert module.temperature < 0.5  # views that agree want it colder
    assert list(module.state_dict()) == ["temperature"]


def test_a_temperature_may_follow_a_schedule() -> None:
    module, (a, b) = losses.NTXentLoss(0.5), views()
    module.temperature = 0.2
    assert torch.equal(module(a, b), losses.nt_xent(a, b, 0.2))


def test_clamp_of_the_logit_scale() -> None:
    scale = nn.Parameter(torch.tensor(5.0))
    assert losses.clamp_logit_scale_(scale) is scale
    assert scale == torch.tensor(math.log(100))
    assert scale.is_leaf
    assert scale.requires_grad
    losses.clamp_logit_scale_(scale.data.fill_(-1.0))
    assert scale == 0
    assert losses.clamp_logit_scale_(scale, min=-3.0, max=-2.0) == -2.0


def test_repr_names_the_options() -> None:
    assert repr(losses.NTXentLoss(0.1)) == (
        "NTXentLoss(temperature=0.1, reduction=mean, label_smoothing=0.0, beta=0.0, tau_plus=0.0)"
    )
    assert repr(losses.ClipLoss()) == "ClipLoss(reduction=mean, label_smoothing=0.0)"
    assert "temperature=learned" in repr(losses.SupConLoss(learned()))
    assert "MemoryQueue(size=20, dim=6, dtype=torch.float32)" in repr(losses.NTXentLoss(memory_bank_size=(SIZE, D)))


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name != "clamp_logit_scale_"])
def test_docstrings_say_what_it_is_where_it_comes_from_and_show_a_call(name: str) -> None:
    doc = inspect.getdoc(getattr(losses, name))
    assert doc is not None
    assert name == "mises_fisher_weights" or "Example:" in doc
    if name.islower() and name != "mises_fisher_weights":
        assert "Source:" in doc and "Raises:" in doc and "loss_i =" in doc
