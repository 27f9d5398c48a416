# SPDX-License-Identifier: Apache-2.0
"""What the losses have in common: weights of samples, reductions, statistics, reweighted negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import loss_formulas as formula
import pytest
import torch
from torch import Tensor

from sslkernels import losses

N, D = 12, 5
LABELS = torch.tensor([8, 0, 3, 1, 0, 3, 2, 9, 1, 3, 2, 3])  # 8 and 9 are alone
EXTRA = torch.randn(9, D, generator=torch.Generator().manual_seed(1)).double()

LOSSES: dict[str, Callable[..., Any]] = {
    "nt_xent": lambda a, b, **o: losses.nt_xent(a, b, **o),
    "nt_xent smoothed": lambda a, b, **o: losses.nt_xent(a, b, label_smoothing=0.1, **o),
    "nt_xent hard": lambda a, b, **o: losses.nt_xent(a, b, beta=1.0, tau_plus=0.1, **o),
    "info_nce": lambda a, b, **o: losses.info_nce(a, b, **o),
    "info_nce smoothed": lambda a, b, **o: losses.info_nce(a, b, label_smoothing=0.1, **o),
    "info_nce hard": lambda a, b, **o: losses.info_nce(a, b, beta=1.0, tau_plus=0.1, **o),
    "info_nce shared": lambda a, b, **o: losses.info_nce(a, b, EXTRA, **o),
    "info_nce shared hard": lambda a, b, **o: losses.info_nce(a, b, EXTRA, beta=1.0, **o),
    "info_nce both": lambda a, b, **o: losses.info_nce(a, b, EXTRA, in_batch=True, **o),
    "info_nce own": lambda a, b, **o: losses.info_nce(a, b, EXTRA.expand(N, 9, D), **o),
    "clip": lambda a, b, **o: losses.clip_loss(a, b, 2.0, **o),
    "clip smoothed": lambda a, b, **o: losses.clip_loss(a, b, 2.0, label_smoothing=0.1, **o),
    "siglip": lambda a, b, **o: losses.siglip_loss(a, b, 2.0, -1.0, **o),
    "siglip smoothed": lambda a, b, **o: losses.siglip_loss(a, b, 2.0, -1.0, label_smoothing=0.1, **o),
    "supcon": lambda a, b, **o: losses.supcon(torch.stack([a, b], 1), **o),
    "supcon labelled": lambda a, b, **o: losses.supcon(a + b, LABELS, **o),
    "dcl": lambda a, b, **o: losses.dcl(a, b, **o),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pair() -> dict[str, Tensor]:
    return {"a": torch.randn(N, D, dtype=torch.float64), "b": torch.randn(N, D, dtype=torch.float64)}


def check_same(x: Callable[..., Tensor], y: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    formula.assert_close(formula.errors(x, y, inputs), formula.bound(torch.float64, 10))


def rows_of(loss: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    """(views, N) of unweighted rows, which another file checks against the formulas."""
    rows = loss(a, b, reduction="none")
    return rows.view(N, 2).T if rows.numel() == 2 * N and loss is LOSSES["supcon"] else rows.view(-1, N)


@every_loss
def test_weights_multiply_the_rows(loss: Callable[..., Any]) -> None:
    inputs, w = pair(), torch.rand(N, dtype=torch.float64) + 0.1
    present = torch.where(LABELS < 8, 1.0, 0.0) if loss is LOSSES["supcon labelled"] else torch.ones(N)

    def weighted_mean(a: Tensor, b: Tensor) -> Tensor:
        rows = rows_of(loss, a, b)
        return (rows * w).sum() / (w * present).sum() / len(rows)

    check_same(lambda a, b: loss(a, b, sample_weight=w), weighted_mean, inputs)
    check_same(
        lambda a, b: loss(a, b, sample_weight=w, reduction="sum"), lambda a, b: (rows_of(loss, a, b) * w).sum(), inputs
    )
    both = loss(**inputs, reduction="none", sample_weight=w)
    expected = rows_of(loss, **inputs) * w
    expected = expected.T if loss is LOSSES["supcon"] else expected
    torch.testing.assert_close(both, expected.flatten(), rtol=1e-14, atol=0)


@every_loss
def test_the_mean_does_not_change_with_the_size_of_the_weights(loss: Callable[..., Any]) -> None:
    inputs = pair()
    weighted = loss(**inputs, sample_weight=torch.full((N,), 3.0))
    torch.testing.assert_close(weighted, loss(**inputs), rtol=1e-14, atol=0)


@every_loss
def test_a_weight_may_be_learned(loss: Callable[..., Any]) -> None:
    inputs = {**pair(), "w": torch.rand(N, dtype=torch.float64) + 0.1}
    for reduction in ("mean", "sum"):
        leaves = formula.leaves(inputs)
        value = loss(leaves["a"], leaves["b"], sample_weight=leaves["w"], reduction=reduction)
        got = formula.gradients(value, leaves)["w"]
        again = formula.leaves(inputs)
        w, rows = again["w"], rows_of(loss, again["a"], again["b"]).detach()
        present = (LABELS < 8) if loss is LOSSES["supcon labelled"] else torch.ones(N, dtype=torch.bool)
        total = (rows * w).sum() / ((w[present].sum() * len(rows)) if reduction == "mean" else 1)
        (want,) = torch.autograd.grad(total, w)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@every_loss
def test_float32_weights_do_not_widen_and_float64_ones_do_not_either(loss: Callable[..., Any]) -> None:
    a, b = (x.float() for x in pair().values())
    if "EXTRA" in loss.__code__.co_names:
        return  # its negatives are float64
    for dtype in (torch.float32, torch.float64):
        for reduction in ("mean", "none"):
            assert loss(a, b, sample_weight=torch.ones(N, dtype=dtype), reduction=reduction).dtype == torch.float32


@every_loss
def test_statistics_cost_the_loss_nothing_of_its_value(loss: Callable[..., Any]) -> None:
    inputs = formula.leaves(pair())
    value, stats = loss(**inputs, return_stats=True)
    assert torch.equal(value, loss(**inputs))
    assert sorted(stats) == ["hardest_negative", "positive", "top1"]
    for x in stats.values():
        assert x.ndim == 0
        assert not x.requires_grad


def logits_of(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Positives (rows, any) and negatives (rows, any) of each row, -inf where there is none."""
    if name == "nt_xent" or name == "dcl":
        z = formula.unit(torch.cat([a, b]))
        s = z @ z.T / (0.5 if name == "nt_xent" else 0.1)
        positive = s[torch.arange(2 * N), torch.arange(2 * N).roll(N)][:, None]
        return positive, s.masked_fill(formula.eye(N).repeat(2, 2), -math.inf)
    if name.startswith("info_nce"):
        s = formula.unit(a) @ formula.unit(b).T / 0.1
        negatives = s.masked_fill(formula.eye(N), -math.inf)
        if name != "info_nce":
            given = formula.unit(a) @ formula.unit(EXTRA).T / 0.1
            negatives = torch.cat([negatives, given], dim=1) if name == "info_nce both" else given
        return s.diagonal()[:, None], negatives
    if name == "supcon labelled":
        z = formula.unit(a + b)
        s, same = z @ z.T / 0.1, LABELS[:, None] == LABELS
        return s.masked_fill(~same | formula.eye(N), -math.inf), s.masked_fill(same, -math.inf)
    s = 2.0 * a @ b.T - (1.0 if name == "siglip" else 0.0)
    return s.diagonal()[:, None], s.masked_fill(formula.eye(N), -math.inf)


MEASURED = ["nt_xent", "info_nce", "info_nce shared", "info_nce shared hard", "info_nce both", "info_nce own"]
MEASURED += ["clip", "siglip", "dcl", "supcon labelled"]


@pytest.mark.parametrize("name", MEASURED)
def test_statistics(name: str) -> None:
    inputs = pair()
    inputs["b"] += 0.5 * inputs["a"]  # so that some rows are right and some wrong
    _, stats = LOSSES[name](**inputs, return_stats=True)
    positive, negative = logits_of(name, **inputs)
    present = positive.amax(1) > -math.inf
    hardest = negative.amax(1)
    right = (positive.amax(1) > hardest)[present].double().mean()
    assert 0 < right < 1
    mean = torch.stack([row[row > -math.inf].mean() for row in positive[present]]).mean()
    torch.testing.assert_close(stats["top1"], right)
    torch.testing.assert_close(stats["positive"], mean)
    torch.testing.assert_close(stats["hardest_negative"], hardest.mean())


@pytest.mark.parametrize("loss", ["info_nce", "info_nce shared", "info_nce own", "both"])
@pytest.mark.parametrize(("beta", "tau_plus"), [(1.0, 0.0), (0.0, 0.1), (2.0, 0.05)])
@pytest.mark.parametrize("frozen", [False, True], ids=["learned keys", "frozen keys"])
def test_reweighted_negatives_of_info_nce(loss: str, beta: float, tau_plus: float, frozen: bool) -> None:
    options = {"beta": beta, "tau_plus": tau_plus, "in_batch": loss == "both"}
    extra = {"info_nce": None, "info_nce own": EXTRA.expand(N, 9, D)}.get(loss, EXTRA)

    def written_out(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        logits, labels = formula.info_nce_logits(a, b, extra, t, options["in_batch"])
        own = labels[:, None] == torch.arange(logits.shape[1])
        positive, negative = logits[own].exp(), logits[~own].view(N, -1).exp()
        g = (negative ** (1 + beta)).sum(1) / (negative**beta).sum(1)
        if tau_plus:
            g = torch.maximum((g - tau_plus * positive) / (1 - tau_plus), torch.exp(-1 / t))
        return torch.log1p(negative.shape[1] * g / positive).mean()

    inputs = {**pair(), "t": torch.tensor(0.5, dtype=torch.float64)}
    key = inputs["b"]
    if frozen:
        inputs.pop("b")
        check_same(
            lambda a, t: losses.info_nce(a, key, extra, t, **options), lambda a, t: written_out(a, key, t), inputs
        )
    else:
        check_same(lambda a, b, t: losses.info_nce(a, b, extra, t, **options), written_out, inputs)


def test_reweighting_with_beta_zero_and_no_false_negatives_is_the_plain_loss() -> None:
    inputs = pair()
    almost = losses.nt_xent(*inputs.values(), tau_plus=1e-12)
    torch.testing.assert_close(almost, losses.nt_xent(*inputs.values()), rtol=1e-10, atol=0)
