# SPDX-License-Identifier: Apache-2.0
"""Each loss against its formula written out in float64, against values worked by hand, and its symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import loss_formulas as formula
import pytest
import torch
from torch import Tensor

from sslkernels import losses

F64 = torch.float64
N, D, M = 13, 7, 9  # no multiple of anything
LABELS = torch.tensor([2, 0, 1, 2, 0, 77, 1, 2, 0, 3, 0, 3, 5])  # groups of 4, 3, 2, 2 and two rows alone


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


class Case(NamedTuple):
    loss: Callable[..., Any]
    formula: Callable[..., Tensor]
    inputs: Callable[[], dict[str, Tensor]]


def views() -> dict[str, Tensor]:
    return {"a": rand(N, D), "b": rand(N, D), "t": number(0.3)}


def shared() -> dict[str, Tensor]:
    return {**views(), "extra": rand(M, D)}


def own() -> dict[str, Tensor]:
    return {**views(), "extra": rand(N, 4, D)}


def image_text() -> dict[str, Tensor]:
    return {"a": rand(N, D), "b": rand(N, D), "scale": number(1.7), "bias": number(-0.6)}


def spread(p: Tensor, q: Tensor) -> Tensor:
    return ((p - 2 * q) ** 2 * p.exp()).sum(1)  # not the same the other way round


def labelled(**options: Any) -> Case:
    return Case(
        lambda a, t: losses.supcon(a, LABELS, t, **options),
        lambda a, t: formula.supcon(a, LABELS, t, **options),
        lambda: {"a": rand(N, D), "t": number(0.3)},
    )


def two_views(**options: Any) -> Case:
    return Case(
        lambda a, b, t: losses.nt_xent(a, b, t, **options), lambda a, b, t: formula.nt_xent(a, b, t, **options), views
    )


def query_keys(inputs: Callable[[], dict[str, Tensor]], **options: Any) -> Case:
    return Case(
        lambda a, b, t, extra=None: losses.info_nce(a, b, extra, t, **options),
        lambda a, b, t, extra=None: formula.info_nce(a, b, extra, t, **options),
        inputs,
    )


def hard(beta: float, tau_plus: float) -> Case:
    options = {"beta": beta, "tau_plus": tau_plus}
    return Case(
        lambda a, b, t: losses.nt_xent(a, b, t, **options),
        lambda a, b, t: formula.hard_nt_xent(a, b, t, **options),
        views,
    )


def image_text_case(ours: Callable[..., Any], theirs: Callable[..., Tensor], **options: Any) -> Case:
    return Case(
        lambda a, b, scale, bias=None: ours(a, b, scale, bias, **options),
        lambda a, b, scale, bias=0.0: theirs(a, b, scale, bias, **options),
        image_text,
    )


CASES = {
    "nt_xent": two_views(),
    "nt_xent sum": two_views(reduction="sum"),
    "nt_xent rows": two_views(reduction="none"),
    "nt_xent smoothed": two_views(label_smoothing=0.1),
    "nt_xent smoothed rows": two_views(label_smoothing=0.1, reduction="none"),
    "nt_xent hard": hard(1.0, 0.0),
    "nt_xent debiased": hard(0.0, 0.1),
    "nt_xent hard debiased": hard(0.5, 0.05),
    "nt_xent at the floor": hard(0.0, 0.9),
    "info_nce": query_keys(views),
    "info_nce sum": query_keys(views, reduction="sum"),
    "info_nce rows": query_keys(views, reduction="none"),
    "info_nce smoothed": query_keys(views, label_smoothing=0.2),
    "info_nce as given": query_keys(views, normalize=False),
    "info_nce shared": query_keys(shared),
    "info_nce shared sum": query_keys(shared, reduction="sum"),
    "info_nce shared rows": query_keys(shared, reduction="none"),
    "info_nce shared smoothed": query_keys(shared, label_smoothing=0.2),
    "info_nce shared and batch": query_keys(shared, in_batch=True),
    "info_nce shared and batch smoothed": query_keys(shared, in_batch=True, label_smoothing=0.2, reduction="none"),
    "info_nce own": query_keys(own),
    "info_nce own rows": query_keys(own, reduction="none"),
    "info_nce own smoothed": query_keys(own, label_smoothing=0.2),
    "info_nce own and batch": query_keys(own, in_batch=True),
    "clip": image_text_case(losses.clip_loss, formula.clip),
    "clip rows": image_text_case(losses.clip_loss, formula.clip, reduction="none"),
    "clip sum": image_text_case(losses.clip_loss, formula.clip, reduction="sum"),
    "clip smoothed": image_text_case(losses.clip_loss, formula.clip, label_smoothing=0.2),
    "siglip": image_text_case(losses.siglip_loss, formula.siglip),
    "siglip smoothed": image_text_case(losses.siglip_loss, formula.siglip, label_smoothing=0.2),
    "siglip rows": Case(
        lambda a, b, scale, bias: losses.siglip_loss(a, b, scale, bias, reduction="none"),
        lambda a, b, scale, bias: formula.siglip_rows(a, b, scale, bias),
        image_text,
    ),
    "siglip sum": Case(
        lambda a, b, scale, bias: losses.siglip_loss(a, b, scale, bias, reduction="sum"),
        lambda a, b, scale, bias: formula.siglip_rows(a, b, scale, bias).sum(),
        image_text,
    ),
    "supcon": labelled(),
    "supcon smoothed": labelled(label_smoothing=0.2),
    "supcon rows": Case(
        lambda a, t: losses.supcon(a, LABELS, t, reduction="none"),
        lambda a, t: formula.supcon_rows(a, LABELS, t)[0],
        lambda: {"a": rand(N, D), "t": number(0.3)},
    ),
    "supcon labelled views": Case(
        lambda a, t: losses.supcon(a, torch.tensor([1, 0, 1, 4]), t),
        lambda a, t: formula.supcon(a.flatten(0, 1), torch.tensor([1, 0, 1, 4]).repeat_interleave(3), t),
        lambda: {"a": rand(4, 3, D), "t": number(0.3)},
    ),
    "supcon views": Case(
        lambda a, t: losses.supcon(a, None, t),
        lambda a, t: formula.supcon(a.flatten(0, 1), torch.arange(5).repeat_interleave(3), t),
        lambda: {"a": rand(5, 3, D), "t": number(0.3)},
    ),
    "dcl": Case(lambda a, b, t: losses.dcl(a, b, t), lambda a, b, t: formula.dcl(a, b, t), views),
    "dcl rows": Case(
        lambda a, b, t: losses.dcl(a, b, t, reduction="none"),
        lambda a, b, t: formula.dcl_rows(a, b, t).flatten(),
        views,
    ),
    "dcl weighted": Case(
        lambda a, b, t: losses.dcl(a, b, t, spread), lambda a, b, t: formula.dcl(a, b, t, spread), views
    ),
    "dcl weighted rows": Case(
        lambda a, b, t: losses.dcl(a, b, t, spread, reduction="none"),
        lambda a, b, t: formula.dcl_rows(a, b, t, spread).flatten(),
        views,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_every_gradient_are_those_of_the_formula(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    if name.startswith("clip"):
        inputs.pop("bias")  # its gradient is zero: a test of its own
    formula.assert_close(formula.errors(case.loss, case.formula, inputs), formula.bound(F64, 1 / 0.3))


@pytest.mark.parametrize("name", CASES)
def test_a_number_for_temperature_scale_and_bias_is_the_same_as_a_tensor(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    as_numbers = {key: x.item() if x.ndim == 0 else x for key, x in inputs.items()}
    # 1 / t and its product are each rounded once in either form
    torch.testing.assert_close(case.loss(**as_numbers), case.loss(**inputs), rtol=formula.bound(F64, 4), atol=0)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "info_nce", "clip", "siglip", "supcon"])
def test_a_batch_whose_matrix_is_not_kept(name: str) -> None:
    """Beyond 4 MiB of logits other ways are taken than for the small batches above."""
    case = CASES[name]
    inputs = {**case.inputs(), "a": rand(1030, D), "b": rand(1030, D)}
    if name == "supcon":
        labels = torch.randint(300, (1030,))
        inputs.pop("b")
        case = Case(lambda a, t: losses.supcon(a, labels, t), lambda a, t: formula.supcon(a, labels, t), case.inputs)
    if name == "clip":
        inputs.pop("bias")
    formula.assert_close(formula.errors(case.loss, case.formula, inputs), formula.bound(F64, 1 / 0.3))


def test_clip_has_a_zero_gradient_for_its_bias() -> None:
    inputs = formula.leaves(image_text())
    loss = losses.clip_loss(inputs["a"], inputs["b"], inputs["scale"], inputs["bias"])
    assert formula.gradients(loss, inputs)["bias"] == 0
    without = losses.clip_loss(inputs["a"], inputs["b"], inputs["scale"])
    assert torch.equal(loss, without)


E = torch.eye(4)
ONE = torch.ones(4, 3)
LOG = {
    "1 + 1/e": math.log(1 + math.exp(-1)),
    "1 + 2/e": math.log(1 + 2 * math.exp(-1)),
    "1 + 2/e^2": math.log(1 + 2 * math.exp(-2)),
}


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        # orthonormal features: a positive of 1 (over the temperature), negatives of 0; one feature: all logits equal
        pytest.param(lambda: losses.nt_xent(E[:2], E[:2], 1.0), LOG["1 + 2/e"], id="nt_xent orthonormal"),
        pytest.param(lambda: losses.nt_xent(E[:2], E[:2]), LOG["1 + 2/e^2"], id="nt_xent, temperature 1/2"),
        pytest.param(lambda: losses.nt_xent(ONE, ONE), math.log(7), id="nt_xent collapsed"),
        pytest.param(lambda: losses.nt_xent(E[:1], E[1:2]), 0.0, id="nt_xent of one sample"),
        pytest.param(lambda: losses.info_nce(E[:2], E[:2], None, 1.0), LOG["1 + 1/e"], id="info_nce orthonormal"),
        pytest.param(
            lambda: losses.info_nce(E[:1], E[:1], torch.stack([E[1], -E[0]]), 1.0),
            math.log(1 + math.exp(-1) + math.exp(-2)),
            id="info_nce, a negative at 0 and one at -1",
        ),
        pytest.param(
            lambda: losses.info_nce(E[:2], E[:2], E[2:3], 1.0, in_batch=True),
            LOG["1 + 2/e"],
            id="info_nce, one negative from the batch and one given",
        ),
        pytest.param(lambda: losses.clip_loss(E[:2], E[:2], 2.0), math.log(1 + math.exp(-2)), id="clip orthonormal"),
        pytest.param(lambda: losses.clip_loss(ONE, ONE, 5.0), math.log(4), id="clip collapsed"),
        pytest.param(
            lambda: losses.siglip_loss(E[:2], E[:2], 10.0, -10.0),
            math.log(2) + math.log1p(math.exp(-10)),
            id="siglip at its starting values",
        ),
        pytest.param(
            lambda: losses.siglip_loss(E[:3], E[:3], 1.0), LOG["1 + 1/e"] + 2 * math.log(2), id="siglip without bias"
        ),
        pytest.param(
            lambda: losses.supcon(E[[0, 1, 0, 1]], torch.tensor([5, 3, 5, 3]), 1.0), LOG["1 + 2/e"], id="supcon pairs"
        ),
        pytest.param(
            # two rows see logits 1 and 0 of their two positives, the third sees 0 and 0
            lambda: losses.supcon(E[[0, 0, 1]], torch.zeros(3, dtype=torch.long), 1.0),
            (2 * (math.log(math.e + 1) - 0.5) + math.log(2)) / 3,
            id="supcon of one class",
        ),
        pytest.param(lambda: losses.supcon(ONE, torch.tensor([0, 0, 0, 9])), math.log(3), id="supcon, one row alone"),
        pytest.param(lambda: losses.supcon(ONE, torch.arange(4)), 0.0, id="supcon without any positive"),
        pytest.param(lambda: losses.dcl(E[:2], E[:2], 1.0), math.log(2) - 1, id="dcl orthonormal"),
        pytest.param(lambda: losses.dcl(ONE, ONE), math.log(6), id="dcl collapsed"),
        pytest.param(
            # positives of 1 and -1; weights 2 - 2 softmax([2, -2]); negatives of 0, two a row
            lambda: losses.DCLWLoss(1.0)(E[:2], E[:2] * torch.tensor([[1.0], [-1.0]])),
            math.log(2) - ((2 - 2 / (1 + math.exp(-4))) - (2 - 2 / (1 + math.exp(4)))) / 2,
            id="dclw",
        ),
    ],
)
def test_values_worked_by_hand(loss: Callable[[], Tensor], value: float) -> None:
    # the logits here are at most 10: their rounding is what is allowed
    assert float(loss()) == pytest.approx(value, rel=formula.bound(torch.float32, 10), abs=4 * torch.finfo().eps)


@pytest.mark.parametrize(
    "name", ["nt_xent", "info_nce", "clip", "siglip", "supcon", "dcl", "dcl weighted", "nt_xent hard debiased"]
)
def test_gradcheck(name: str) -> None:
    case = CASES[name]
    inputs = formula.leaves(case.inputs())
    torch.autograd.gradcheck(lambda *xs: case.loss(**dict(zip(inputs, xs))), tuple(inputs.values()))


PAIRED = ["nt_xent rows", "info_nce rows", "info_nce shared rows", "clip rows", "siglip rows", "dcl rows"]


@pytest.mark.parametrize("name", PAIRED)
def test_permuted_samples_permute_the_rows(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    order = torch.randperm(N)
    shuffled = {**inputs, "a": inputs["a"][order], "b": inputs["b"][order]}
    rows = case.loss(**inputs).view(-1, N)[:, order].flatten()
    torch.testing.assert_close(case.loss(**shuffled), rows, rtol=formula.bound(F64, 4), atol=0)


def test_permuted_samples_permute_the_rows_of_supcon() -> None:
    a, order = rand(N, D), torch.randperm(N)
    rows = losses.supcon(a, LABELS, reduction="none")[order]
    shuffled = losses.supcon(a[order], LABELS[order], reduction="none")
    torch.testing.assert_close(shuffled, rows, rtol=formula.bound(F64, 10), atol=1e-15)


def test_renamed_labels_change_nothing() -> None:
    a = rand(N, D)
    names = torch.randperm(100)
    torch.testing.assert_close(losses.supcon(a, names[LABELS]), losses.supcon(a, LABELS), rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", [losses.nt_xent, losses.dcl], ids=lambda f: f.__name__)
def test_swapping_the_views_changes_nothing(loss: Callable[..., Tensor]) -> None:
    a, b = rand(N, D), rand(N, D)
    torch.testing.assert_close(loss(a, b), loss(b, a), rtol=formula.bound(F64, 10), atol=0)


def test_swapping_images_and_texts_changes_nothing() -> None:
    a, b = rand(N, D), rand(N, D)
    torch.testing.assert_close(losses.clip_loss(a, b, 2.0), losses.clip_loss(b, a, 2.0))
    torch.testing.assert_close(losses.siglip_loss(a, b, 2.0, -1.0), losses.siglip_loss(b, a, 2.0, -1.0))


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "info_nce shared", "info_nce own", "supcon", "dcl"])
def test_length_does_not_matter_and_the_gradient_is_tangent(name: str) -> None:
    case = CASES[name]
    inputs = formula.leaves(case.inputs())
    loss = case.loss(**inputs)
    features = {key: x for key, x in inputs.items() if x.ndim > 1}
    lengths = {key: torch.rand(x.shape[:-1], dtype=F64) + 0.5 for key, x in features.items()}
    longer = {key: x.detach() * lengths[key].unsqueeze(-1) for key, x in features.items()}
    torch.testing.assert_close(case.loss(**{**inputs, **longer}), loss, rtol=formula.bound(F64, 4), atol=0)
    for key, grad in formula.gradients(loss, features).items():
        x = features[key].detach()
        assert float((grad * x).sum(-1).abs().max()) <= 100 * torch.finfo(F64).eps * float((grad.abs() * x.abs()).max())


def test_two_labelled_views_are_nt_xent() -> None:
    a, b = rand(N, D), rand(N, D)
    torch.testing.assert_close(
        losses.supcon(torch.stack([a, b], 1), None, 0.5), losses.nt_xent(a, b), rtol=1e-14, atol=0
    )


def test_a_row_without_positive_gets_no_gradient_from_its_own_row() -> None:
    a = rand(3, D).requires_grad_()
    rows = losses.supcon(a, torch.tensor([0, 0, 1]), reduction="none")
    (grad,) = torch.autograd.grad(rows[2], a)
    assert rows[2] == 0
    assert not grad.any()
