# SPDX-License-Identifier: Apache-2.0
"""Masked and causal language modelling, next sentences, HuBERT: against the published forms in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import loss_formulas as formula
import pytest
import sequence_formulas as published
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import losses

B, L, D, V = 3, 7, 5, 11
IGNORE = -100


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels(selected: float = 0.5) -> Tensor:
    out = torch.randint(V, (B, L))
    return out.masked_fill(torch.rand(B, L) >= selected, IGNORE)


def inputs(**more: Tensor) -> dict[str, Tensor]:
    return {"hidden": randn(B, L, D), "weight": randn(V, D), **more}


def check(loss: Callable[..., Tensor], truth: Callable[..., Tensor], leaves: dict[str, Tensor]) -> None:
    formula.assert_close(formula.errors(loss, truth, leaves), formula.bound(torch.float64, 40))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "reduction": "none"},
}


class TestLanguageModels:
    @pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_masked(self, options: dict[str, Any], bias: bool) -> None:
        y = labels()
        check(
            lambda **x: losses.masked_lm_loss(labels=y, **x, **options),
            lambda **x: published.language_model(labels=y, **x, **options),
            inputs(bias=randn(V)) if bias else inputs(),
        )

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_causal_is_the_next_token(self, options: dict[str, Any]) -> None:
        y = labels(0.8)

        def truth(hidden: Tensor, weight: Tensor) -> Tensor:
            """As in transformers: logits without the last position, labels without the first."""
            found = published.language_model(hidden[:, :-1], weight, y[:, 1:], **options)
            return F.pad(found, (0, 1)) if options.get("reduction") == "none" else found

        check(lambda **x: losses.causal_lm_loss(labels=y, **x, **options), truth, inputs())

    def test_by_hand(self) -> None:
        """Logits (log 2, 0) and (0, log 3): probabilities 2/3 and 3/4 of the right token."""
        hidden = torch.tensor([[math.log(2), 0.0], [0.0, math.log(3)]])
        eye = torch.eye(2)
        value = losses.masked_lm_loss(hidden, eye, torch.tensor([0, 1]))
        torch.testing.assert_close(value, torch.tensor((math.log(1.5) + math.log(4 / 3)) / 2))
        # the first position is asked for the second token, the last for nothing
        torch.testing.assert_close(
            losses.causal_lm_loss(hidden, eye, torch.tensor([1, 0])), torch.tensor(math.log(1.5))
        )

    def test_a_first_token_that_is_ignored_separates_documents(self) -> None:
        x, y = inputs(), labels(1.0)
        y[:, 4] = IGNORE
        rows = losses.causal_lm_loss(labels=y, reduction="none", **x)
        assert (rows[:, 3] == 0).all() and (rows[:, [0, 1, 2, 4, 5]] > 0).all() and (rows[:, 6] == 0).all()

    def test_the_mean_of_no_token_is_nan_and_bert_adds_1e_5(self) -> None:
        x, none = inputs(), torch.full((B, L), IGNORE)
        assert losses.masked_lm_loss(labels=none, **x).isnan()
        assert losses.masked_lm_loss(labels=none, reduction="sum", **x) == 0
        y = labels()
        count = int((y != IGNORE).sum())
        bert = losses.masked_lm_loss(labels=y, reduction="sum", **x) / (count + 1e-5)
        torch.testing.assert_close(losses.masked_lm_loss(labels=y, **x), bert, rtol=1e-5 / count, atol=0)

    def test_a_tied_embedding_gets_both_gradients(self) -> None:
        tokens, embedding = torch.randint(V, (B, L)), nn.Embedding(V, D).double()
        losses.causal_lm_loss(embedding(tokens), embedding.weight, tokens).backward()
        got = embedding.weight.grad
        logits = F.linear(embedding(tokens), embedding.weight)[:, :-1]
        (expected,) = torch.autograd.grad(
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), embedding.weight
        )
        torch.testing.assert_close(got, expected)

    def test_nothing_but_the_asked_rows_is_read(self) -> None:
        x, y = inputs(), labels()
        x["hidden"][y == IGNORE] = torch.nan
        x = formula.leaves(x)
        loss = losses.masked_lm_loss(labels=y, **x)
        loss.backward()
        assert loss.isfinite() and x["weight"].grad.isfinite().all()
        assert (x["hidden"].grad[y == IGNORE] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bits(self, dtype: torch.dtype) -> None:
        y, x = labels(), {name: t.to(dtype) for name, t in inputs().items()}
        found = formula.errors(
            lambda **x: losses.masked_lm_loss(labels=y, **x), lambda **x: published.language_model(labels=y, **x), x
        )
        assert found.pop("value") < 1e-2
        formula.assert_close(found, 2e-2)
        assert losses.masked_lm_loss(labels=y, **x).dtype == torch.float32


class TestNextSentence:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_is_cross_entropy(self, reduction: str) -> None:
        y = torch.tensor([0, 1, 1, 0])
        check(
            lambda x: losses.next_sentence_loss(x, y, reduction=reduction),
            lambda x: F.cross_entropy(x, y, reduction=reduction),
            {"x": randn(4, 2) * 3},
        )

    def test_by_hand(self) -> None:
        """0: it follows. Odds of 3 to 1 for that."""
        logits = torch.tensor([[math.log(3), 0.0]])
        torch.testing.assert_close(losses.next_sentence_loss(logits, torch.tensor([0])), torch.tensor(math.log(4 / 3)))
        torch.testing.assert_close(losses.next_sentence_loss(logits, torch.tensor([1])), torch.tensor(math.log(4)))

    def test_a_sure_model_keeps_its_digits(self) -> None:
        """exp(-14), where one minus a float32 probability has two digits left."""
        logits = torch.tensor([[14.0, 0.0]], requires_grad=True)
        loss = losses.next_sentence_loss(logits, torch.tensor([0]))
        torch.testing.assert_close(loss.double(), torch.log1p(torch.tensor(-14.0).double().exp()), rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad[0, 1].double(), torch.tensor(-14.0).double().sigmoid(), rtol=1e-6, atol=0)

    def test_values_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 2"):
            losses.next_sentence_loss(torch.randn(2, 2), torch.tensor([0, 2]))
        with pytest.raises(ValueError, match=r"logits must have shape \(B, 2\), got \(2, 3\)"):
            losses.next_sentence_loss(torch.randn(2, 3), torch.tensor([0, 1]))


class TestHuBERT:
    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.x = {"x": randn(B, L, D), "units": torch.rand(V, D, dtype=torch.float64)}
        self.labels, self.mask = torch.randint(V, (B, L)), torch.rand(B, L) < 0.5

    def loss(self, x: Tensor, units: Tensor, **options: Any) -> Tensor:
        return losses.hubert_loss(x, units, self.labels, **{"mask": self.mask, **options})

    def rows(self, x: Tensor, units: Tensor, which: Tensor) -> Tensor:
        return published.hubert_rows(x[which], units, self.labels[which])

    def test_is_fairseqs_sum_over_its_sample_size(self) -> None:
        def truth(x: Tensor, units: Tensor) -> Tensor:
            return self.rows(x, units, self.mask).sum() / self.mask.sum()

        check(self.loss, truth, self.x)
        check(lambda **x: self.loss(reduction="sum", **x), lambda **x: self.rows(which=self.mask, **x).sum(), self.x)

    @pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 2.0), (0.7, 0.7)], ids=str)
    def test_weights_of_masked_and_unmasked_frames(self, weights: tuple[float, float]) -> None:
        masked, unmasked = weights
        options = {"pred_masked_weight": masked, "pred_nomask_weight": unmasked}

        def total(x: Tensor, units: Tensor) -> Tensor:
            seen = self.rows(x, units, ~self.mask).sum()
            return masked * self.rows(x, units, self.mask).sum() + unmasked * seen

        size = int(self.mask.sum()) * (masked > 0) + int((~self.mask).sum()) * (unmasked > 0)
        check(lambda **x: self.loss(**x, **options), lambda **x: total(**x) / size, self.x)
        rows = self.loss(**self.x, **options, reduction="none")
        assert rows.shape == (B, L)
        torch.testing.assert_close(rows.sum(), total(**self.x))
        torch.testing.assert_close(rows[self.mask], masked * self.rows(**self.x, which=self.mask))

    def test_without_a_mask_all_frames_count_but_padding(self) -> None:
        self.labels[:, 5:] = IGNORE
        counted = self.labels != IGNORE
        value = self.loss(**self.x, mask=None)
        torch.testing.assert_close(value, self.rows(**self.x, which=counted).mean())
        both = self.loss(**self.x, pred_nomask_weight=0.25)
        seen = 0.25 * self.rows(**self.x, which=counted & ~self.mask).sum()
        expected = (self.rows(**self.x, which=counted & self.mask).sum() + seen) / counted.sum()
        torch.testing.assert_close(both, expected)

    def test_by_hand(self) -> None:
        """Two orthogonal units, a frame that points at the first: cosines 1 and 0, over a temperature of 1."""
        value = losses.hubert_loss(torch.tensor([[3.0, 0.0]]), 5 * torch.eye(2), torch.tensor([0]), temperature=1.0)
        torch.testing.assert_close(value, torch.tensor(math.log(1 + math.exp(-1))))

    def test_lengths_do_not_matter(self) -> None:
        scaled = {"x": self.x["x"] * torch.rand(B, L, 1) * 9, "units": self.x["units"] * (1 + torch.rand(V, 1))}
        torch.testing.assert_close(self.loss(**scaled), self.loss(**self.x))

    def test_a_learned_temperature_gets_its_gradient(self) -> None:
        def truth(x: Tensor, units: Tensor, t: Tensor) -> Tensor:
            return published.hubert_rows(x[self.mask], units, self.labels[self.mask], t).mean()

        check(
            lambda x, units, t: self.loss(x, units, temperature=t), truth, {**self.x, "t": torch.tensor(0.3).double()}
        )

    def test_frames_of_weight_zero_are_not_read(self) -> None:
        x = self.x["x"].masked_fill(~self.mask[..., None], torch.nan)
        assert torch.equal(self.loss(x, self.x["units"]), self.loss(**self.x))

    def test_no_masked_frame_is_nan_and_its_sum_is_0(self) -> None:
        none = torch.zeros(B, L, dtype=torch.bool)
        assert self.loss(**self.x, mask=none).isnan()
        assert self.loss(**self.x, mask=none, reduction="sum") == 0

    @pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 0.5), (0.7, 0.7)], ids=str)
    def test_where_nothing_counts_gradients_are_zero(self, weights: tuple[float, float]) -> None:
        self.labels.fill_(IGNORE)
        x = formula.leaves(self.x)
        loss = self.loss(**x, pred_masked_weight=weights[0], pred_nomask_weight=weights[1])
        assert loss.isnan()
        assert all((g == 0).all() for g in torch.autograd.grad(loss, list(x.values())))

    def test_frames_that_are_all_masked_at_weight_zero_ask_nothing(self) -> None:
        options = {"mask": None, "pred_masked_weight": 0.0, "pred_nomask_weight": 1.0}
        assert self.loss(**self.x, **options).isnan()
        assert self.loss(**self.x, **options, reduction="sum") == 0

    def test_float32_is_within_twice_eager(self) -> None:
        """At temperature 0.01 the logits reach 100."""
        x = {name: t.float() for name, t in self.x.items()}

        def truth(x: Tensor, units: Tensor) -> Tensor:
            return published.hubert_rows(x[self.mask], units, self.labels[self.mask], 0.01).mean()

        mine = formula.errors(lambda **x: self.loss(**x, temperature=0.01), truth, x)
        formula.assert_close(mine, formula.bound(torch.float32, 100))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bits(self, dtype: torch.dtype) -> None:
        x = {name: t.to(dtype) for name, t in self.x.items()}
        found = formula.errors(self.loss, lambda **x: self.rows(which=self.mask, **x).mean(), x)
        assert found.pop("value") < 1e-2
        formula.assert_close(found, 2e-2)

    def test_bad_input(self) -> None:
        x, units = self.x["x"], self.x["units"]
        with pytest.raises(ValueError, match=r"label_embeddings must have as many features as x \(5\)"):
            self.loss(x, units[:, :4])
        with pytest.raises(ValueError, match=r"mask must have shape \(3, 7\), got \(3, 6\)"):
            self.loss(x, units, mask=self.mask[:, :6])
        with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.int64"):
            self.loss(x, units, mask=self.mask.long())
        with pytest.raises(ValueError, match="pred_masked_weight and pred_nomask_weight must not both be 0"):
            self.loss(x, units, pred_masked_weight=0.0)
        with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
            self.loss(x, units, temperature=0)
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\).*, got"):
            self.loss(x, units[:3])


@pytest.mark.parametrize("loss", [losses.masked_lm_loss, losses.causal_lm_loss], ids=["masked", "causal"])
def test_bad_input_of_language_models(loss: Callable[..., Tensor]) -> None:
    x, y = inputs(), labels(1.0)
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 7\), got \(3, 6\)"):
        loss(**x, labels=y[:, :6])
    with pytest.raises(TypeError, match=r"labels must be torch\.int64, got torch\.float32"):
        loss(**x, labels=y.float())
    with pytest.raises(ValueError, match=r"labels must be in \[0, 11\) or -100, which is ignored, got -1"):
        loss(**x, labels=torch.full((B, L), -1))
    with pytest.raises(ValueError, match=r"weight must have as many features as hidden \(5\), got shape \(11, 4\)"):
        loss(x["hidden"], x["weight"][:, :4], y)
    with pytest.raises(ValueError, match=r"bias must have shape \(11,\), got \(5,\)"):
        loss(**x, labels=y, bias=randn(5))
    with pytest.raises(ValueError, match=r"hidden must not be an empty batch, got shape \(0, 7, 5\)"):
        loss(x["hidden"][:0], x["weight"], y[:0])
    with pytest.raises(ValueError, match=r"hidden must be .*, D.*, got shape \(5,\)"):
        loss(x["hidden"][0, 0], x["weight"], y)
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor, got list"):
        loss([1.0], x["weight"], y)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'batch'"):
        loss(**x, labels=y, reduction="batch")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0.0, 1.0\), got 1.5"):
        loss(**x, labels=y, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"z_loss must be in \[0.0, inf\), got -1.0"):
        loss(**x, labels=y, z_loss=-1.0)
    with pytest.raises(ValueError, match="labels must be on the device of hidden"):
        loss(**x, labels=y.to("meta"))


@pytest.mark.parametrize("ignored", [2**63 - 1, -(2**63), 2**53 + 1])
def test_any_64_bit_label_may_be_ignored(ignored: int) -> None:
    hidden, weight, tokens = randn(B, L, D), randn(V, D), torch.randint(V, (B, L))
    asked = losses.causal_lm_loss(hidden, weight, tokens.index_fill(1, torch.tensor([3]), IGNORE))
    again = losses.causal_lm_loss(
        hidden, weight, tokens.index_fill(1, torch.tensor([3]), ignored), ignore_index=ignored
    )
    assert torch.equal(asked, again)


def test_a_sequence_of_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match=r"hidden must have at least two positions .*, got shape \(3, 1, 5\)"):
        losses.causal_lm_loss(randn(B, 1, D), randn(V, D), torch.zeros(B, 1, dtype=torch.long))
