# SPDX-License-Identifier: Apache-2.0
"""The quantizers against VQ-VAE's and fairseq's forms: values, straight-through gradients, statistics, state."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.nn import GumbelVectorQuantizer, VectorQuantizer

B, T, D, CODES = 3, 7, 6, 5


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def vq(**options: Any) -> VectorQuantizer:
    module = VectorQuantizer(CODES, D, **options).double()
    module.codebook.data.copy_(randn(CODES, D))
    return module


class TestVectorQuantizer:
    def test_is_vq_vaes(self) -> None:
        module, x = vq(commitment=0.3), randn(B, T, D).requires_grad_()
        out = module(x)
        book = module.codebook.detach().clone().requires_grad_()
        ids = torch.cdist(x.flatten(0, 1), book).argmin(1)
        codes = book[ids].view(B, T, D)
        loss = F.mse_loss(codes, x.detach()) + 0.3 * F.mse_loss(x, codes.detach())
        assert torch.equal(out.ids, ids.view(B, T))
        assert torch.equal(out.x, codes)
        torch.testing.assert_close(out.loss, loss)
        cotangent = randn(B, T, D)
        mine = torch.autograd.grad((out.x * cotangent).sum() + out.loss, [x, module.codebook])
        straight = x + (codes - x).detach()
        theirs = torch.autograd.grad((straight * cotangent).sum() + loss, [x, book])
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b)

    def test_moving_averages_are_the_papers(self) -> None:
        """Two batches by hand: counts and sums as averages, codes their smoothed ratio, and no gradient for them."""
        module = vq(decay=0.9)
        book = module.codebook.clone()
        module.total.copy_(book)
        count, total = torch.ones(CODES).double(), book.clone()
        for _ in range(2):
            x = randn(B, T, D)
            ids = torch.cdist(x.flatten(0, 1), book).argmin(1)
            chosen = F.one_hot(ids, CODES).double()
            out = module(x.requires_grad_())
            torch.testing.assert_close(out.loss, 0.25 * F.mse_loss(x, book[ids].view(B, T, D)))
            torch.testing.assert_close(out.x, book[ids].view(B, T, D))
            count = 0.9 * count + 0.1 * chosen.sum(0)
            total = 0.9 * total + 0.1 * chosen.T @ x.detach().flatten(0, 1)
            n = count.sum()
            book = total / ((count + 1e-5) / (n + CODES * 1e-5) * n)[:, None]
            torch.testing.assert_close(module.codebook, book)
        assert not list(module.parameters())
        before = copy.deepcopy(module.state_dict())
        module.eval()(x)
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values()))

    @pytest.mark.parametrize("decay", [None, 0.8], ids=["by gradient", "by averages"])
    def test_learns_three_clusters(self, decay: float | None) -> None:
        torch.manual_seed(0)
        centres = 4 * torch.eye(3)
        module = VectorQuantizer(3, 3, decay=decay)
        module.codebook.data.copy_(centres + torch.randn(3, 3))
        if decay is not None:
            module.total.copy_(module.codebook)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0) if decay is None else None
        for _ in range(60):
            x = centres[torch.arange(96) % 3] + 0.1 * torch.randn(96, 3)
            out = module(x)
            if optimizer is not None:
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
        assert (module.codebook - centres).abs().max() < 0.1
        assert torch.equal(module(centres).ids, torch.arange(3))

    def test_a_code_that_nobody_chooses_stays_finite(self) -> None:
        module = VectorQuantizer(2, 1, decay=0.5)
        module.codebook.copy_(torch.tensor([[0.0], [1e3]]))
        module.total.copy_(module.codebook)
        for _ in range(300):  # its count falls below the smallest float32
            module(torch.zeros(4, 1))
        assert module.codebook.isfinite().all()

    @pytest.mark.parametrize("decay", [None, 0.9], ids=["by gradient", "by averages"])
    def test_state_dict_round_trip(self, decay: float | None) -> None:
        module, other = (VectorQuantizer(CODES, D, decay=decay) for _ in range(2))
        x = torch.randn(B, T, D)
        module(x)
        other.load_state_dict(module.state_dict())
        assert list(module.state_dict()) == ["codebook"] if decay is None else ["codebook", "count", "total"]
        assert torch.equal(other(x).x, module(x).x)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_and_16_bit_rows(self, dtype: torch.dtype) -> None:
        module, x = VectorQuantizer(CODES, D, decay=0.9).eval(), torch.randn(B, T, D)
        expected = module(x)
        with torch.autocast("cpu", dtype):
            out = module(x)
        assert torch.equal(out.ids, expected.ids) and torch.equal(out.x, expected.x)
        assert out.loss.dtype == torch.float32
        rounded = module(x.to(dtype))
        assert rounded.x.dtype == dtype and rounded.loss.dtype == torch.float32

    @pytest.mark.parametrize("decay", [None, 0.9], ids=["by gradient", "by averages"])
    def test_compiled(self, decay: float | None) -> None:
        torch.compiler.reset()
        module = VectorQuantizer(CODES, D, decay=decay)
        other, x = copy.deepcopy(module), torch.randn(B, T, D)
        mine = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        theirs = other(x)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
        for a, b in zip(module.state_dict().values(), other.state_dict().values()):
            torch.testing.assert_close(a, b)

    def test_nan_is_nan(self) -> None:
        x = torch.randn(B, T, D)
        x[0, 0, 0] = torch.nan
        out = VectorQuantizer(CODES, D)(x)
        assert out.x[0, 0, 0].isnan() and out.loss.isnan() and out.x[0, 1:].isfinite().all()

    def test_bad_input(self) -> None:
        module = VectorQuantizer(CODES, D)
        with pytest.raises(ValueError, match=r"x must have shape \(..., 6\), got \(3, 5\)"):
            module(torch.randn(3, 5))
        with pytest.raises(ValueError, match="x must not be an empty batch"):
            module(torch.randn(0, D))
        with pytest.raises(TypeError, match=r"x must be float32.*, got torch\.int64"):
            module(torch.zeros(3, D, dtype=torch.long))
        with pytest.raises(ValueError, match=r"decay must be in \[0.0, 1.0\), got 1.0"):
            VectorQuantizer(CODES, D, decay=1.0)
        with pytest.raises(ValueError, match="num_codes must be at least 1, got 0"):
            VectorQuantizer(0, D)

    def test_repr(self) -> None:
        assert repr(VectorQuantizer(5, 6)) == "VectorQuantizer(num_codes=5, dim=6, commitment=0.25, decay=None)"


def gumbel(**options: Any) -> GumbelVectorQuantizer:
    return GumbelVectorQuantizer(D, **{"num_vars": CODES, "groups": 2, "vq_dim": 8, **options}).double()


def fairseq(module: GumbelVectorQuantizer, x: Tensor, noise: Tensor | None, temperature: float) -> dict[str, Tensor]:
    """Its forward with a given noise: the broadcast of one-hots over all codes, and the perplexities."""
    n, groups, codes = x[..., 0].numel(), module.groups, module.num_vars
    logits = module.weight_proj(x.flatten(0, 1)).view(n * groups, codes)
    hard = F.one_hot(logits.argmax(-1), codes).to(x.dtype)
    probabilities = logits.view(n, groups, codes).softmax(-1).mean(0)
    usage = hard.view(n, groups, codes).mean(0)
    if noise is not None:
        soft = ((logits + noise.view(n * groups, codes)) / temperature).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), codes).to(x.dtype) - soft.detach() + soft
    book = module.vars.repeat(1, groups, 1) if module.combine_groups else module.vars
    out = (hard.view(n, -1).unsqueeze(-1) * book).view(n, groups, codes, -1).sum(-2)

    def perplexity(p: Tensor) -> Tensor:
        return torch.exp(-torch.sum(p * torch.log(p + 1e-7), dim=-1)).sum()

    return {
        "x": out.view(*x.shape[:-1], -1),
        "ids": hard.view(*x.shape[:-1], groups, codes).argmax(-1),
        "probabilities": probabilities,
        "code_perplexity": perplexity(usage),
        "prob_perplexity": perplexity(probabilities),
    }


def noise_of(generator: torch.Generator) -> Tensor:
    """What the module draws, from a copy of its generator."""
    copied = torch.Generator().set_state(generator.get_state())
    return -torch.empty(B * T, 2, CODES, dtype=torch.float64).exponential_(generator=copied).log()


class TestGumbelVectorQuantizer:
    @pytest.mark.parametrize("combine", [False, True], ids=["a codebook each", "one codebook"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_is_fairseqs(self, combine: bool, training: bool) -> None:
        module = gumbel(combine_groups=combine).train(training)
        module.weight_proj.bias.data.copy_(randn(2 * CODES))
        module.set_num_updates(100_000)
        x, generator = randn(B, T, D).requires_grad_(), torch.Generator().manual_seed(3)
        noise = noise_of(generator) if training else None
        out = module(x, generator=generator)
        expected = fairseq(module, x, noise, 2.0 * 0.999995**100_000)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(out, name), value)
        cotangents = randn(B, T, 8), randn(2, CODES)
        leaves = [x, module.vars, module.weight_proj.weight, module.weight_proj.bias]

        def gradients(codes: Tensor, probabilities: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad((codes * cotangents[0]).sum() + (probabilities * cotangents[1]).sum(), leaves)

        for mine, theirs in zip(
            gradients(out.x, out.probabilities), gradients(expected["x"], expected["probabilities"])
        ):
            torch.testing.assert_close(mine, theirs)

    def test_values_are_codes_bit_for_bit(self) -> None:
        """Two frames of one code are equal, which is how wav2vec 2.0 knows a distractor that is the target."""
        module = GumbelVectorQuantizer(D, num_vars=CODES, groups=2, vq_dim=8)
        out = module(torch.randn(50, D))
        book = module.vars.detach().view(2, CODES, 4)
        expected = torch.cat([book[g][out.ids[:, g]] for g in range(2)], dim=1)
        assert torch.equal(out.x, expected)

    def test_statistics_of_the_masked_frames_only(self) -> None:
        module, x, mask = gumbel().eval(), randn(B, T, D), torch.rand(B, T) < 0.5
        out, chosen = module(x, mask), module(x[mask])
        for name in ("probabilities", "code_perplexity", "prob_perplexity"):
            torch.testing.assert_close(getattr(out, name), getattr(chosen, name))
        assert out.x.shape == (B, T, 8)
        torch.testing.assert_close(out.x[mask], chosen.x)

    def test_no_masked_frame_leaves_finite_statistics_and_gradients(self) -> None:
        """A rank may have none while others have some."""
        module, x = GumbelVectorQuantizer(D, num_vars=CODES, vq_dim=4), torch.randn(B, T, D, requires_grad=True)
        out = module(x, torch.zeros(B, T, dtype=torch.bool))
        assert not out.probabilities.any()
        out.probabilities.sum().backward()
        assert not x.grad.any() and not module.weight_proj.weight.grad.any()

    def test_the_noise_draws_codes_as_often_as_their_softmax_says(self) -> None:
        """The Gumbel-max property, by chi-square."""
        module = GumbelVectorQuantizer(1, num_vars=4, groups=1, vq_dim=1)
        module.weight_proj.weight.data.zero_()
        module.weight_proj.bias.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        n = 20_000
        counts = module(torch.zeros(n, 1)).ids.flatten().bincount(minlength=4)
        expected = n * torch.tensor([0.1, 0.2, 0.3, 0.4])
        assert ((counts - expected) ** 2 / expected).sum() < 16.3  # three degrees of freedom, one in a thousand

    def test_starts_as_fairseqs(self) -> None:
        module = GumbelVectorQuantizer(512)
        shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
        assert shapes == {"vars": (1, 640, 128), "weight_proj.weight": (640, 512), "weight_proj.bias": (640,)}
        assert 0 <= module.vars.min() < 1e-3 and 0.999 < module.vars.max() < 1
        assert abs(module.weight_proj.weight.std() - 1) < 0.01
        assert (module.weight_proj.bias == 0).all()

    def test_temperature_falls_and_stops(self) -> None:
        module = gumbel(temp=(2.0, 0.5, 0.5))
        found = []
        for updates in (0, 1, 2, 9):
            module.set_num_updates(updates)
            found.append(module.curr_temp)
        assert found == [2.0, 1.0, 0.5, 0.5]

    def test_state_dict_round_trip(self) -> None:
        module, other = gumbel().eval(), gumbel().eval()
        other.load_state_dict(module.state_dict())
        x = randn(B, T, D)
        assert all(torch.equal(a, b) for a, b in zip(module(x), other(x)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_rounds_the_projection_only(self, dtype: torch.dtype) -> None:
        module, x = GumbelVectorQuantizer(D, CODES, vq_dim=8), torch.randn(B, T, D, requires_grad=True)
        with torch.autocast("cpu", dtype):
            out = module(x)
            assert out.x.dtype == dtype and out.probabilities.dtype == torch.float32
            torch.testing.assert_close(out.probabilities.sum(1), torch.ones(2), rtol=1e-6, atol=0)
            out.x.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0

    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_compiled(self, training: bool) -> None:
        torch.compiler.reset()
        module = GumbelVectorQuantizer(D, CODES, vq_dim=8).train(training)
        compiled, x = torch.compile(module, backend="aot_eager", fullgraph=True), torch.randn(B, T, D)
        for updates in (0, 10, 20):  # the temperature changes with every step
            module.set_num_updates(updates)
            torch.manual_seed(1)
            mine = compiled(x, torch.rand(B, T) < 2)
            torch.manual_seed(1)
            for a, b in zip(mine, module(x, torch.rand(B, T) < 2)):
                torch.testing.assert_close(a, b)

    def test_bad_input(self) -> None:
        module = gumbel()
        with pytest.raises(ValueError, match=r"x must have shape \(..., 6\), got \(3, 5\)"):
            module(randn(3, 5))
        with pytest.raises(ValueError, match="x must not be an empty batch"):
            module(randn(0, D))
        with pytest.raises(ValueError, match=r"mask must have shape \(3, 7\), got \(3,\)"):
            module(randn(B, T, D), torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"vq_dim must be a multiple of groups \(2\), got 7"):
            gumbel(vq_dim=7)
        with pytest.raises(ValueError, match=r"temp must be \(start, end, decay\), got \(2.0, 0.5\)"):
            gumbel(temp=(2.0, 0.5))
        with pytest.raises(ValueError, match=r"temp\[1\] must be positive and finite, got 0"):
            gumbel(temp=(2.0, 0, 0.9))

    def test_repr(self) -> None:
        assert "num_vars=320, groups=2, combine_groups=False, temp=(2.0, 0.5, 0.999995)" in repr(
            GumbelVectorQuantizer(8)
        )


def test_a_model_learns_through_it() -> None:
    """An autoencoder of two kinds of rows, with a quantizer in the middle."""
    for quantizer in (VectorQuantizer(8, 4), VectorQuantizer(8, 4, decay=0.9), GumbelVectorQuantizer(4, 8, vq_dim=4)):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(6, 4), quantizer, nn.Linear(4, 6)])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        kinds = torch.randn(2, 6)
        found = []
        for _ in range(150):
            x = kinds[torch.randint(2, (64,))]
            out = quantizer(model[0](x))
            loss = F.mse_loss(model[2](out.x), x)
            found.append(loss.item())
            optimizer.zero_grad()
            (loss + getattr(out, "loss", 0.0)).backward()
            optimizer.step()
        assert math.isfinite(found[-1]) and found[-1] < 0.1 * found[0], type(quantizer).__name__
