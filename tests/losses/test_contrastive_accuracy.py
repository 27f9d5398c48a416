# SPDX-License-Identifier: Apache-2.0
"""How exact the losses are: down to a loss of 1e-6, in 16 bits, under autocast, and at extreme logits.

Truth is the formula in float64 on the same inputs; eager is the same formula in the precision of the loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import loss_formulas as formula
import pytest
import torch
from torch import Tensor

from sslkernels import losses

N, D, M = 65, 33, 130  # past a tile of 64, and odd
EPS = torch.finfo(torch.float32).eps
SEEDS = range(5)
PAIRS = torch.arange(N).repeat(2)
TRIPLES = torch.arange(3 * N) % N


class Case(NamedTuple):
    loss: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    inputs: Callable[[], dict[str, Tensor]]


def close_views() -> dict[str, Tensor]:
    a = torch.randn(N, D)
    return {"a": a, "b": a + 0.1 * torch.randn(N, D)}


def with_extra(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {**close_views(), "extra": torch.randn(*shape)}


def unit_pairs() -> dict[str, Tensor]:
    return {name: formula.unit(x) for name, x in close_views().items()}


# scale is 1 / temperature for the losses that have one: the larger, the smaller is the loss
SOFTMAX = {
    "nt_xent": Case(
        lambda a, b, scale: losses.nt_xent(a, b, 1 / scale),
        lambda a, b, scale: formula.nt_xent(a, b, 1 / scale),
        close_views,
    ),
    "nt_xent rows": Case(
        lambda a, b, scale: losses.nt_xent(a, b, 1 / scale, reduction="none"),
        lambda a, b, scale: formula.nt_xent(a, b, 1 / scale, reduction="none"),
        close_views,
    ),
    "info_nce": Case(
        lambda a, b, scale: losses.info_nce(a, b, None, 1 / scale),
        lambda a, b, scale: formula.info_nce(a, b, None, 1 / scale),
        close_views,
    ),
    "info_nce rows": Case(
        lambda a, b, scale: losses.info_nce(a, b, None, 1 / scale, reduction="none"),
        lambda a, b, scale: formula.info_nce(a, b, None, 1 / scale, reduction="none"),
        close_views,
    ),
    "info_nce shared": Case(
        lambda a, b, extra, scale: losses.info_nce(a, b, extra, 1 / scale),
        lambda a, b, extra, scale: formula.info_nce(a, b, extra, 1 / scale),
        with_extra(M, D),
    ),
    "info_nce own": Case(
        lambda a, b, extra, scale: losses.info_nce(a, b, extra, 1 / scale),
        lambda a, b, extra, scale: formula.info_nce(a, b, extra, 1 / scale),
        with_extra(N, 9, D),
    ),
    "clip": Case(losses.clip_loss, formula.clip, unit_pairs),
    "siglip": Case(
        lambda a, b, scale: losses.siglip_loss(a, b, scale, -0.8 * scale),
        lambda a, b, scale: formula.siglip(a, b, scale, -0.8 * scale),
        unit_pairs,
    ),
    "supcon of pairs": Case(
        lambda a, b, scale: losses.supcon(torch.cat([a, b]), PAIRS, 1 / scale),
        lambda a, b, scale: formula.supcon(torch.cat([a, b]), PAIRS, 1 / scale),
        close_views,
    ),
}
# their value is no sum of small terms: it is not small, or passes through 0
OTHER = {
    "dcl": Case(
        lambda a, b, scale: losses.dcl(a, b, 1 / scale),
        lambda a, b, scale: formula.dcl(a, b, 1 / scale),
        close_views,
    ),
    "supcon of triples": Case(
        lambda a, b, extra, scale: losses.supcon(torch.cat([a, b, extra]), TRIPLES, 1 / scale),
        lambda a, b, extra, scale: formula.supcon(torch.cat([a, b, extra]), TRIPLES, 1 / scale),
        with_extra(N, D),
    ),
    "nt_xent hard debiased": Case(
        lambda a, b, scale: losses.nt_xent(a, b, 1 / scale, beta=0.5, tau_plus=0.01),
        lambda a, b, scale: formula.hard_nt_xent(a, b, 1 / scale, beta=0.5, tau_plus=0.01),
        close_views,
    ),
    "clip smoothed": Case(
        lambda a, b, scale: losses.clip_loss(a, b, scale, label_smoothing=0.1),
        lambda a, b, scale: formula.clip(a, b, scale, label_smoothing=0.1),
        unit_pairs,
    ),
}


def positional(case: Case) -> Case:
    """clip_loss names its arguments otherwise than the inputs here are named."""
    return case._replace(
        loss=lambda **named: case.loss(*named.values()), formula=lambda **named: case.formula(*named.values())
    )


def scale_for(case: Case, inputs: dict[str, Tensor], target: float) -> Tensor:
    """The scale at which the mean loss is `target`, by bisection of its logarithm."""
    exact = {name: x.double() for name, x in inputs.items()}
    low, high = 0.1, 200.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        value = case.formula(**exact, scale=torch.tensor(middle).double()).mean()
        low, high = (middle, high) if value > target else (low, middle)
    assert 0.2 < low < 150, f"no scale gives a loss of {target}"
    return torch.tensor(low)


def check_float32(case: Case, make: Callable[[], dict[str, Tensor]]) -> None:
    """Below the absolute bound each time, and the median of the draws below twice eager's plus one rounding.

    Not the worst draw: where a draw's true gradient all but cancels, either error is a matter of luck.
    """
    mine: dict[str, list[float]] = defaultdict(list)
    eager: dict[str, list[float]] = defaultdict(list)
    for seed in SEEDS:
        torch.manual_seed(seed)
        inputs = make()
        found = formula.errors(case.loss, case.formula, inputs)
        formula.assert_close(found, formula.bound(torch.float32, float(inputs["scale"])))
        usual = formula.errors(case.formula, case.formula, inputs)
        for name in found:
            mine[name].append(found[name])
            eager[name].append(usual[name])
    medians = {name: (median(mine[name]), median(eager[name])) for name in mine}
    wrong = {name: pair for name, pair in medians.items() if pair[0] > 2 * pair[1] + EPS}
    assert not wrong, f"errors (ours, eager's) {wrong}"


@pytest.mark.parametrize("target", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("name", SOFTMAX)
def test_float32_down_to_a_loss_of_a_millionth(name: str, target: float) -> None:
    case = positional(SOFTMAX[name])

    def make() -> dict[str, Tensor]:
        inputs = case.inputs()
        return {**inputs, "scale": scale_for(case, inputs, target)}

    check_float32(case, make)


@pytest.mark.parametrize("scale", [2.0, 10.0, 20.0])
@pytest.mark.parametrize("name", OTHER)
def test_float32_of_the_losses_that_are_not_small(name: str, scale: float) -> None:
    case = positional(OTHER[name])
    check_float32(case, lambda: {**case.inputs(), "scale": torch.tensor(scale)})


@pytest.mark.parametrize("views", ["close", "independent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*SOFTMAX, *OTHER])
def test_16_bit_features(name: str, dtype: torch.dtype, views: str) -> None:
    """Of close views little is left of the gradient of normalised features, whose radial part is taken away: that
    magnifies the rounding, eager's too."""
    case = positional({**SOFTMAX, **OTHER}[name])
    eps = torch.finfo(dtype).eps
    inputs = {key: x.to(dtype) for key, x in case.inputs().items()}
    if views == "independent":
        inputs["b"] = formula.unit(torch.randn(N, D)).to(dtype)
    inputs["scale"] = torch.tensor(5.0)  # stays float32
    found = formula.errors(case.loss, case.formula, inputs)
    usual = formula.errors(case.formula, case.formula, {**inputs, "scale": inputs["scale"].to(dtype)})
    limits = {key: 2 * usual[key] + eps for key in found}
    if views == "independent":
        limits = {key: min(limit, 1e-2 if key == "value" else 2e-2) for key, limit in limits.items()}
    wrong = {key: (found[key], usual[key]) for key in found if not found[key] <= limits[key]}
    assert not wrong, f"errors (ours, eager's) {wrong}"


def test_the_result_of_16_bit_features_is_float32() -> None:
    a, b = (x.bfloat16() for x in close_views().values())
    for loss in (losses.nt_xent, losses.info_nce, losses.dcl):
        assert loss(a, b).dtype == torch.float32
    assert losses.supcon(a, torch.zeros(N, dtype=torch.long)).dtype == torch.float32
    assert losses.clip_loss(a, b, 2.0).dtype == torch.float32
    assert losses.siglip_loss(a, b, 2.0, -1.0).dtype == torch.float32


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda a, b: losses.clip_loss(a, b, 5.0), id="clip"),
        pytest.param(lambda a, b: losses.siglip_loss(a, b, 5.0, -1.0), id="siglip"),
        pytest.param(lambda a, b: losses.info_nce(a, b), id="info_nce"),
        pytest.param(lambda a, b: losses.info_nce(a, a.detach().roll(1, 1), b), id="info_nce shared"),
        pytest.param(lambda a, b: losses.nt_xent(a, b), id="nt_xent"),
    ],
)
def test_features_of_two_dtypes(loss: Callable[..., Tensor]) -> None:
    """bfloat16 is widened, not float32 rounded: the result is that of two float32 tensors."""
    inputs = {"a": formula.unit(torch.randn(N, D)), "b": formula.unit(torch.randn(N, D)).bfloat16()}
    mixed, wide = formula.leaves(inputs), formula.leaves(inputs, torch.float32)
    value, true_value = loss(**mixed), loss(**wide)
    # the normalised bfloat16 rows of three of them are rounded once more
    torch.testing.assert_close(value, true_value, rtol=2e-2, atol=0)
    got, want = formula.gradients(value, mixed), formula.gradients(true_value, wide)
    assert got["b"].dtype == torch.bfloat16
    assert formula.relative(got["a"], want["a"].double()) < 2e-2
    assert formula.relative(got["b"], want["b"].double()) < 2e-2


class TestAutocast:
    """Features are rounded after they are normalised, the positive's as well as the sweep's; nothing else is."""

    def rounded(self) -> dict[str, Tensor]:
        return {name: x.bfloat16().double() for name, x in unit_pairs().items()}

    def under_autocast(self, loss: Callable[..., Any], *args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*args)
        assert value.dtype == torch.float32
        return value.double()

    def test_nt_xent(self) -> None:
        torch.manual_seed(0)
        z = self.rounded()
        torch.manual_seed(0)
        value = self.under_autocast(losses.nt_xent, *close_views().values(), 0.07)
        torch.testing.assert_close(
            value, formula.nt_xent(z["a"], z["b"], 0.07, normalize=False), rtol=formula.bound(torch.float32, 15), atol=0
        )

    def test_info_nce(self) -> None:
        torch.manual_seed(0)
        z = self.rounded()
        torch.manual_seed(0)
        value = self.under_autocast(losses.info_nce, *close_views().values(), None, 0.07)
        torch.testing.assert_close(
            value,
            formula.info_nce(z["a"], z["b"], None, 0.07, normalize=False),
            rtol=formula.bound(torch.float32, 15),
            atol=0,
        )

    def test_clip_and_siglip(self) -> None:
        torch.manual_seed(0)
        z = self.rounded()
        torch.manual_seed(0)
        pairs = unit_pairs().values()
        rtol = formula.bound(torch.float32, 10)
        value = self.under_autocast(losses.clip_loss, *pairs, 10.0)
        torch.testing.assert_close(value, formula.clip(z["a"], z["b"], 10.0), rtol=rtol, atol=0)
        value = self.under_autocast(losses.siglip_loss, *pairs, 10.0, -5.0)
        torch.testing.assert_close(value, formula.siglip(z["a"], z["b"], 10.0, -5.0), rtol=rtol, atol=0)

    @pytest.mark.parametrize("loss", [losses.nt_xent, losses.info_nce, losses.dcl], ids=lambda f: f.__name__)
    def test_gradients_come_back_in_the_dtype_of_the_features(self, loss: Callable[..., Tensor]) -> None:
        inputs = formula.leaves(close_views())
        exact = formula.leaves(inputs, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(inputs["a"], inputs["b"])
        got = formula.gradients(value, inputs)
        want = formula.gradients(getattr(formula, loss.__name__)(*exact.values()), exact)
        for name in inputs:
            assert got[name].dtype == torch.float32
            assert formula.relative(got[name], want[name]) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_temperature_of_a_thousandth(dtype: torch.dtype) -> None:
    """Logits of 1000: exp of one overflows."""
    inputs = {"a": torch.randn(N, D, dtype=dtype), "b": torch.randn(N, D, dtype=dtype)}
    for ours, theirs in (
        (losses.nt_xent, formula.nt_xent),
        (losses.info_nce, formula.info_nce),
        (losses.dcl, formula.dcl),
    ):
        found = formula.errors(
            lambda a, b, f=ours: f(a, b, temperature=1e-3), lambda a, b, f=theirs: f(a, b, temperature=1e-3), inputs
        )
        formula.assert_close(found, formula.bound(dtype, 1e3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unnormalised_features_of_norm_ten_thousand(dtype: torch.dtype) -> None:
    inputs = {name: 1e4 * formula.unit(torch.randn(N, D, dtype=dtype)) for name in "ab"}
    for ours, theirs in ((losses.clip_loss, formula.clip), (losses.siglip_loss, formula.siglip)):
        found = formula.errors(lambda a, b, f=ours: f(a, b, 1.0), lambda a, b, f=theirs: f(a, b, 1.0), inputs)
        formula.assert_close(found, formula.bound(dtype, 1e8))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": losses.nt_xent,
    "info_nce": losses.info_nce,
    "dcl": losses.dcl,
    "clip": lambda a, b: losses.clip_loss(a, b, 2.0),
    "siglip": lambda a, b: losses.siglip_loss(a, b, 2.0, -1.0),
    "supcon": lambda a, b: losses.supcon(torch.stack([a, b], 1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nan_is_not_hidden(name: str) -> None:
    a, b = close_views().values()
    a[3, 5] = torch.nan
    assert LOSSES[name](a, b).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_each_time(name: str, threads: int) -> None:
    inputs = close_views()
    results = []
    for _ in range(2):
        mine = formula.leaves(inputs)
        loss = LOSSES[name](mine["a"], mine["b"])
        results.append((loss, *formula.gradients(loss, mine).values()))
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", LOSSES)
def test_strided_features(name: str) -> None:
    a, b = close_views().values()
    column_major = a.t().contiguous().t()
    every_other = torch.stack([b, b.new_full(b.shape, torch.nan)], 1).flatten(0, 1)[::2]
    torch.testing.assert_close(LOSSES[name](column_major, every_other), LOSSES[name](a, b))
