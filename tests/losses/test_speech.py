# SPDX-License-Identifier: Apache-2.0
"""wav2vec 2.0 and CPC against the published forms in float64: gathered distractors, loops over positions."""

from __future__ import annotations

import math
from typing import Any

import loss_formulas as formula
import pytest
import sequence_formulas as published
import torch
from torch import Tensor

from sslkernels import losses
from sslkernels.ops import distractor_counts

B, T, D, C, K = 3, 19, 6, 5, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def draws_of(mask: Tensor, count: int, seed: int) -> list[list[list[int]]]:
    """What the loss drew, as lists: the order of draws does not matter to a sum."""
    lengths = mask.sum(1)
    counts = distractor_counts(lengths, max(int(lengths.max()), 1), count, seed=seed).long()
    return [[torch.arange(len(row)).repeat_interleave(row).tolist() for row in sample] for sample in counts]


class TestWav2Vec2:
    negatives, seed = 12, 5

    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.x = {"context": randn(B, T, D), "targets": randn(B, T, D)}
        self.mask = torch.rand(B, T) < 0.6

    def loss(self, context: Tensor, targets: Tensor, **options: Any) -> Any:
        options = {"mask": self.mask, "num_negatives": self.negatives, "seed": self.seed, **options}
        return losses.wav2vec2_loss(context, targets, **options)

    def rows(self, context: Tensor, targets: Tensor, temperature: Any = 0.1) -> Tensor:
        draws = draws_of(self.mask, self.negatives, self.seed)
        return torch.cat(published.wav2vec2_rows(context, targets, self.mask, draws, temperature))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_fairseqs(self, reduction: str) -> None:
        found = formula.errors(
            lambda **x: self.loss(**x, reduction=reduction), lambda **x: getattr(self.rows(**x), reduction)(), self.x
        )
        formula.assert_close(found, formula.bound(torch.float64, 20))

    def test_rows_are_frames(self) -> None:
        rows = self.loss(**self.x, reduction="none")
        assert rows.shape == (B, T)
        torch.testing.assert_close(rows[self.mask], self.rows(**self.x))
        assert (rows[~self.mask] == 0).all()

    def test_distractors_equal_to_the_target_do_not_count(self) -> None:
        """Codes of a small codebook: many frames have the same one; 0.0 and -0.0 are the same too."""
        codes = randn(3, D)
        codes[0, 0] = 0.0
        self.x["targets"] = codes[torch.randint(3, (B, T))]
        self.x["targets"][:, ::2] *= torch.where(self.x["targets"][:, ::2] == 0, -1.0, 1.0)
        assert (self.x["targets"].signbit() & (self.x["targets"] == 0)).any()
        found = formula.errors(self.loss, lambda **x: self.rows(**x).mean(), self.x)
        formula.assert_close(found, formula.bound(torch.float64, 20))

    @pytest.mark.parametrize("groups", [(), (2,)])
    def test_ids_tell_what_rounding_hides(self, groups: tuple[int, ...]) -> None:
        """Rows of one code that differ in their last bits: without ids they are distractors, whose cosine is 1."""
        codes = torch.randint(3, (B, T))
        self.x["targets"] = randn(3, D)[codes]
        exact = self.loss(**self.x)
        self.x["targets"] = self.x["targets"] * (1 + 1e-12 * randn(B, T, D))
        ids = codes.view(B, T, *[1] * len(groups)).expand(B, T, *groups)
        torch.testing.assert_close(self.loss(**self.x, ids=ids), exact)
        assert self.loss(**self.x) > exact + 0.1

    def test_where_all_targets_are_equal_nothing_is_left_to_learn(self) -> None:
        self.x["targets"] = randn(D).expand(B, T, D)
        x = formula.leaves(self.x)
        loss = self.loss(**x)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, list(x.values())))

    def test_by_hand(self) -> None:
        """Two masked frames: each is the other's only distractor, as often as there are draws."""
        context = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        targets = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
        value = losses.wav2vec2_loss(context, targets, num_negatives=7, temperature=1.0)
        torch.testing.assert_close(value, torch.tensor(math.log(1 + 7 * math.exp(-1))))

    def test_an_utterance_with_one_masked_frame_or_none(self) -> None:
        self.mask[0], self.mask[1] = False, False
        self.mask[1, 4] = True
        x = formula.leaves(self.x)
        rows = self.loss(**x, reduction="none")
        assert (rows[:2] == 0).all() and (rows[2][self.mask[2]] > 0).all()
        grads = torch.autograd.grad(rows.sum(), list(x.values()))
        assert all(g.isfinite().all() and (g[:2] == 0).all() for g in grads)
        torch.testing.assert_close(self.loss(**self.x), rows.sum() / self.mask.sum())

    def test_no_masked_frame_is_nan_and_its_sum_is_0(self) -> None:
        none = torch.zeros_like(self.mask)
        assert self.loss(**self.x, mask=none).isnan()
        assert self.loss(**self.x, mask=none, reduction="sum") == 0

    def test_gathered_frames_need_no_mask(self) -> None:
        """One count in all utterances, as fairseq trims to: the same draws, the same loss."""
        self.mask = (torch.rand(B, T).argsort(1) < 9) & True
        gathered = {name: x[self.mask].view(B, 9, D) for name, x in self.x.items()}
        torch.testing.assert_close(self.loss(**gathered, mask=None), self.loss(**self.x))

    def test_frames_outside_of_the_mask_are_not_read(self) -> None:
        expected = self.loss(**self.x)
        x = formula.leaves({name: t.masked_fill(~self.mask[..., None], torch.nan) for name, t in self.x.items()})
        loss = self.loss(**x)
        assert torch.equal(loss, expected)
        assert all((g[~self.mask] == 0).all() and g.isfinite().all() for g in torch.autograd.grad(loss, [*x.values()]))

    def test_an_utterance_without_a_masked_frame_is_not_read(self) -> None:
        self.mask[1] = False
        expected = self.loss(**self.x)
        self.x["context"][1], self.x["targets"][1] = torch.nan, torch.nan
        x = formula.leaves(self.x)
        loss = self.loss(**x)
        assert torch.equal(loss, expected)
        assert all((g[1] == 0).all() and g.isfinite().all() for g in torch.autograd.grad(loss, [*x.values()]))

    def test_nan_in_a_masked_frame_is_nan(self) -> None:
        b, t = self.mask.nonzero()[0].tolist()
        self.x["context"][b, t, 0] = torch.nan
        rows = self.loss(**self.x, reduction="none")
        assert rows[b, t].isnan() and rows.isnan().sum() == 1
        assert self.loss(**self.x).isnan()

    def test_lengths_do_not_matter(self) -> None:
        scaled = {name: x * (0.1 + torch.rand(B, T, 1)) for name, x in self.x.items()}
        torch.testing.assert_close(self.loss(**scaled), self.loss(**self.x))

    def test_a_learned_temperature_gets_its_gradient(self) -> None:
        x = {**self.x, "t": torch.tensor(0.3).double()}
        found = formula.errors(
            lambda context, targets, t: self.loss(context, targets, temperature=t),
            lambda context, targets, t: self.rows(context, targets, t).mean(),
            x,
        )
        formula.assert_close(found, formula.bound(torch.float64, 20))

    def test_draws_follow_seed_and_generator(self) -> None:
        assert torch.equal(self.loss(**self.x), self.loss(**self.x))
        assert self.loss(**self.x) != self.loss(**self.x, seed=6)
        one, two = (self.loss(**self.x, seed=None, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
        assert torch.equal(one, two)

    def test_stats(self) -> None:
        self.x["context"] = self.x["targets"] + 0.3 * randn(B, T, D)
        value, stats = self.loss(**self.x, return_stats=True)
        assert torch.equal(value, self.loss(**self.x))
        correct, positive, hardest = [], [], []
        for b, draws in enumerate(draws_of(self.mask, self.negatives, self.seed)):
            x, y = (formula.unit(v[b][self.mask[b]]) for v in self.x.values())
            s = 10 * x @ y.T
            for i in range(len(x)):
                top = s[i][draws[i]].max()
                correct.append(s[i, i] > top)
                positive.append(s[i, i])
                hardest.append(top)
        assert 0 < sum(correct) < len(correct)
        for name, expected in (("top1", correct), ("positive", positive), ("hardest_negative", hardest)):
            torch.testing.assert_close(stats[name].double(), torch.stack(expected).double().mean(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("target", [1.0, 1e-3, 1e-6], ids=str)
    def test_float32_keeps_its_digits_down_to_a_loss_of_1e_6(self, target: float) -> None:
        """Context close to its target; the temperature that makes the loss this small, by bisection."""
        self.x["context"] = self.x["targets"] + 0.05 * randn(B, T, D)
        low, high = 0.005, 5.0
        for _ in range(50):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.rows(**self.x, temperature=middle).mean() > target else (middle, high)
        x = {name: v.float() for name, v in self.x.items()}
        found = formula.errors(
            lambda **x: self.loss(**x, temperature=low), lambda **x: self.rows(**x, temperature=low).mean(), x
        )
        assert found.pop("value") <= formula.bound(torch.float32, 1 / low)
        formula.assert_close(found, 2 * formula.bound(torch.float32, 1 / low))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bits(self, dtype: torch.dtype) -> None:
        x = {name: v.to(dtype) for name, v in self.x.items()}
        found = formula.errors(self.loss, lambda **x: self.rows(**x).mean(), x)
        assert found.pop("value") < 1e-2
        formula.assert_close(found, 2e-2)

    def test_bad_input(self) -> None:
        context, targets = self.x.values()
        with pytest.raises(ValueError, match=r"context must be \(B, T, D\), got shape \(3, 19\)"):
            self.loss(context[..., 0], targets)
        with pytest.raises(ValueError, match=r"targets must have as many frames as context \(3, 19, 6\)"):
            self.loss(context, targets[:, :5])
        with pytest.raises(ValueError, match=r"targets must have the shape of context \(3, 19, 6\), got \(3, 19, 5\)"):
            self.loss(context, targets[..., :5])
        with pytest.raises(ValueError, match=r"context must not be an empty batch, got shape \(0, 19, 6\)"):
            self.loss(context[:0], targets[:0])
        with pytest.raises(ValueError, match=r"mask must have shape \(3, 19\), got \(3, 18\)"):
            self.loss(context, targets, mask=self.mask[:, 1:])
        with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.uint8"):
            self.loss(context, targets, mask=self.mask.byte())
        with pytest.raises(TypeError, match=r"ids must be torch\.int64, got torch\.bool"):
            self.loss(context, targets, ids=self.mask)
        with pytest.raises(ValueError, match=r"ids must have shape \(3, 19\), or that with .*, got \(3, 18\)"):
            self.loss(context, targets, ids=self.mask[:, 1:].long())
        with pytest.raises(ValueError, match="num_negatives must be at least 1, got 0"):
            self.loss(context, targets, num_negatives=0)
        with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
            self.loss(context, targets, temperature=0)
        with pytest.raises(TypeError, match=r"context must be float32.*, got torch\.int64"):
            self.loss(context.long(), targets)


class TestWav2Vec2Loss:
    def test_is_fairseqs_sum_over_the_masked_frames(self) -> None:
        """Its criterion: CE summed + 0.1 S diversity + 10 S penalty, divided by S in the trainer."""
        torch.manual_seed(0)
        context, targets, mask = randn(B, T, D), randn(B, T, D), torch.rand(B, T) < 0.5
        probabilities, features = randn(2, 8).softmax(1).requires_grad_(), randn(4, 9).requires_grad_()
        loss, stats = losses.Wav2Vec2Loss()(
            context, targets, mask, probabilities, features.square().mean(), seed=1, return_stats=True
        )
        size = mask.sum()
        summed = losses.wav2vec2_loss(context, targets, mask, seed=1, reduction="sum")
        penalty = features.square().mean()
        expected = (summed + 0.1 * size * published.diversity(probabilities) + 10 * size * penalty) / size
        torch.testing.assert_close(loss, expected)
        leaves = [probabilities, features]
        for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
            torch.testing.assert_close(mine, theirs)
        assert set(stats) == {"top1", "positive", "hardest_negative", "contrastive", "diversity", "penalty"}
        torch.testing.assert_close(stats["contrastive"], summed / size)

    def test_the_penalty_is_a_tensor_of_one_element(self) -> None:
        context, targets = randn(B, T, D), randn(B, T, D)
        loss = losses.Wav2Vec2Loss()(context, targets, features_penalty=torch.ones(1), seed=1)
        assert loss.shape == ()
        with pytest.raises(TypeError, match=r"features_penalty must be a torch\.Tensor, got float"):
            losses.Wav2Vec2Loss()(context, targets, features_penalty=1.0)

    def test_terms_that_are_not_given_are_not_added(self) -> None:
        context, targets = randn(B, T, D), randn(B, T, D)
        value = losses.Wav2Vec2Loss(7, 0.2)(context, targets, seed=1)
        assert torch.equal(value, losses.wav2vec2_loss(context, targets, num_negatives=7, temperature=0.2, seed=1))

    def test_diversity(self) -> None:
        p = {"probabilities": randn(2, 8).softmax(1)}
        formula.assert_close(formula.errors(losses.diversity_loss, published.diversity, p), 1e-13)
        one_code = torch.eye(4)[:2]  # both groups always take one code: perplexity 1 of 4
        torch.testing.assert_close(losses.diversity_loss(one_code), torch.tensor(0.75))
        assert losses.diversity_loss(torch.full((2, 4), 0.25)).abs() < 1e-5
        with pytest.raises(ValueError, match=r"probabilities must be 2-D .*got shape \(4,\)"):
            losses.diversity_loss(torch.ones(4))
        with pytest.raises(ValueError, match="probabilities must not be empty"):
            losses.diversity_loss(torch.ones(2, 0))


NEGATIVES = pytest.mark.parametrize("negatives", ["batch", "sequence"])


class TestCPC:
    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.x = {"context": randn(B, 8, C), "z": randn(B, 8, D), "predictors": randn(K, D, C)}

    @NEGATIVES
    def test_is_the_papers(self, negatives: str) -> None:
        found = formula.errors(
            lambda **x: losses.cpc_loss(**x, negatives=negatives),
            lambda **x: published.cpc(**x, negatives=negatives),
            self.x,
        )
        formula.assert_close(found, formula.bound(torch.float64, 60))

    @NEGATIVES
    def test_reductions(self, negatives: str) -> None:
        expected = published.cpc_rows(**self.x, negatives=negatives)
        rows = losses.cpc_loss(**self.x, negatives=negatives, reduction="none")
        assert rows.shape == (K, B, 8)
        for k, (mine, theirs) in enumerate(zip(rows, expected), start=1):
            torch.testing.assert_close(mine[:, :-k], theirs)
            assert (mine[:, -k:] == 0).all()
        torch.testing.assert_close(losses.cpc_loss(**self.x, negatives=negatives, reduction="sum"), rows.sum())
        found = formula.errors(
            lambda **x: losses.cpc_loss(**x, negatives=negatives, reduction="none").sum(),
            lambda **x: losses.cpc_loss(**x, negatives=negatives, reduction="sum"),
            self.x,
        )
        formula.assert_close(found, formula.bound(torch.float64, 60))

    def test_by_hand(self) -> None:
        """One sequence of two frames, one step: the frame to come against the frame at hand."""
        context, z = torch.tensor([[[2.0], [9.0]]]), torch.tensor([[[1.0], [3.0]]])
        expected = torch.tensor(math.log1p(math.exp(2 * 1 - 2 * 3)))
        for negatives in ("batch", "sequence"):
            value = losses.cpc_loss(context, z, torch.ones(1, 1, 1), negatives=negatives)
            torch.testing.assert_close(value, expected)

    def test_of_one_sequence_both_kinds_are_the_same(self) -> None:
        x = {name: v if name == "predictors" else v[:1] for name, v in self.x.items()}
        torch.testing.assert_close(losses.cpc_loss(**x), losses.cpc_loss(**x, negatives="sequence"))

    @NEGATIVES
    def test_the_order_of_sequences_does_not_matter(self, negatives: str) -> None:
        order = torch.tensor([2, 0, 1])
        x = {name: v if name == "predictors" else v[order] for name, v in self.x.items()}
        torch.testing.assert_close(
            losses.cpc_loss(**x, negatives=negatives), losses.cpc_loss(**self.x, negatives=negatives)
        )

    @NEGATIVES
    def test_stats_are_of_each_step(self, negatives: str) -> None:
        value, stats = losses.cpc_loss(**self.x, negatives=negatives, return_stats=True)
        assert torch.equal(value, losses.cpc_loss(**self.x, negatives=negatives))
        context, z, predictors = self.x.values()
        for k, w in enumerate(predictors, start=1):
            keys = z.flatten(0, 1)
            correct, positives, hardest = [], [], []
            for b in range(B):
                for t in range(8 - k):
                    s = (keys if negatives == "batch" else z[b]) @ (w @ context[b, t])
                    at = (b * 8 if negatives == "batch" else 0) + t + k
                    others = torch.cat([s[:at], s[at + 1 :]])
                    correct.append(s[at] > others.max())
                    positives.append(s[at])
                    hardest.append(others.max())
            for name, rows in (("top1", correct), ("positive", positives), ("hardest_negative", hardest)):
                torch.testing.assert_close(stats[name][k - 1].double(), torch.stack(rows).double().mean())

    @NEGATIVES
    def test_nan_and_large_scores(self, negatives: str) -> None:
        large = {name: 100 * v.float() for name, v in self.x.items()}  # scores of 1e6
        assert losses.cpc_loss(**large, negatives=negatives).isfinite()
        self.x["context"][1, 2, 0] = torch.nan
        rows = losses.cpc_loss(**self.x, negatives=negatives, reduction="none")
        assert rows[:, 1, 2].isnan().all() and rows.isnan().sum() == K

    @NEGATIVES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_precision(self, negatives: str, dtype: torch.dtype) -> None:
        """16 bits: the predictions are rounded as a linear layer's are, so eager's error is the measure."""
        x = {name: 0.5 * v for name, v in self.x.items()}
        x = {name: v.to(dtype) for name, v in x.items()}

        def eager(context: Tensor, z: Tensor, predictors: Tensor) -> Tensor:
            return published.cpc(context, z, predictors, negatives)

        mine = formula.errors(lambda **x: losses.cpc_loss(**x, negatives=negatives), eager, x)
        theirs = formula.errors(eager, eager, x)
        for name, error in mine.items():
            assert error <= 2 * theirs[name] + torch.finfo(dtype).eps, name

    def test_module(self) -> None:
        module = losses.CPCLoss(C, D, K, negatives="sequence").double()
        context, z, _ = self.x.values()
        expected = losses.cpc_loss(context, z, module.predictors, negatives="sequence")
        assert torch.equal(module(context, z), expected)
        assert module.predictors.shape == (K, D, C)
        assert 0.5 * C**-0.5 < module.predictors.abs().max() <= C**-0.5

    def test_bad_input(self) -> None:
        context, z, predictors = self.x.values()
        with pytest.raises(ValueError, match=r"predictors must have shape \(K, 6, 5\), got \(3, 5, 6\)"):
            losses.cpc_loss(context, z, predictors.mT)
        with pytest.raises(ValueError, match=r"predictors must have shape \(K, 6, 5\), got \(0, 6, 5\)"):
            losses.cpc_loss(context, z, predictors[:0])
        with pytest.raises(ValueError, match=r"context must have more frames than steps \(3\), got shape \(3, 3, 5\)"):
            losses.cpc_loss(context[:, :3], z[:, :3], predictors)
        with pytest.raises(ValueError, match=r"z must have as many frames as context \(3, 8, 5\), got \(3, 7, 6\)"):
            losses.cpc_loss(context, z[:, 1:], predictors)
        with pytest.raises(ValueError, match=r"context must not be an empty batch, got shape \(0, 8, 5\)"):
            losses.cpc_loss(context[:0], z[:0], predictors)
        with pytest.raises(ValueError, match="negatives must be one of 'batch', 'sequence', got 'all'"):
            losses.cpc_loss(context, z, predictors, negatives="all")
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            losses.CPCLoss(C, D, 0)
        with pytest.raises(ValueError, match=r"z must be on the device of context \(cpu\), got meta"):
            losses.cpc_loss(context, z.to("meta"), predictors)
