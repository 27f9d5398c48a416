# SPDX-License-Identifier: Apache-2.0
"""What the losses have in common: weights of samples, reductions, statistics; and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import loss_formulas as formula
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels import losses
from sslkernels.losses import MemoryQueue

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


# What is refused. Each entry: the call, the exception, and words of its message.
A, B = torch.randn(4, 3), torch.randn(4, 3)
Y = torch.tensor([0, 0, 1, 1])
TWO_SETS = {
    "nt_xent": (losses.nt_xent, "out0", "out1"),
    "dcl": (losses.dcl, "out0", "out1"),
    "info_nce": (losses.info_nce, "query", "positive_key"),
    "clip": (lambda a, b, **o: losses.clip_loss(a, b, 1.0, **o), "image_features", "text_features"),
    "siglip": (lambda a, b, **o: losses.siglip_loss(a, b, 1.0, 0.0, **o), "image_features", "text_features"),
}
TEMPERED = {
    "nt_xent": lambda t: losses.nt_xent(A, B, t),
    "dcl": lambda t: losses.dcl(A, B, t),
    "info_nce": lambda t: losses.info_nce(A, B, None, t),
    "supcon": lambda t: losses.supcon(A, Y, t),
}


@pytest.mark.parametrize("name", TWO_SETS)
def test_bad_features(name: str) -> None:
    loss, first, second = TWO_SETS[name]
    with pytest.raises(ValueError, match=rf"{first} must be 2-D .*\(4,\)"):
        loss(A[:, 0], B)
    with pytest.raises(ValueError, match=rf"{second} must be 2-D .*\(1, 4, 3\)"):
        loss(A, B[None])
    with pytest.raises(ValueError, match=rf"{second} must have as many features as {first} \(3\), got shape \(4, 2\)"):
        loss(A, B[:, :2])
    with pytest.raises(ValueError, match=rf"{second} must have the shape of {first} \(4, 3\), got \(3, 3\)"):
        loss(A, B[:3])
    with pytest.raises(ValueError, match=rf"{first} must not be an empty batch, got shape \(0, 3\)"):
        loss(A[:0], B[:0])
    with pytest.raises(TypeError, match=rf"{first} must have a floating dtype, got torch.int64"):
        loss(A.long(), B)
    with pytest.raises(TypeError, match=rf"{second} must be float32.* got torch.float8_e5m2"):
        loss(A, B.to(torch.float8_e5m2))
    with pytest.raises(ValueError, match=rf"{second} must be on the device of {first} \(cpu\), got meta"):
        loss(A, B.to("meta"))
    with pytest.raises(TypeError, match=rf"{first} must be a torch.Tensor, got ndarray"):
        loss(A.numpy(), B)


@pytest.mark.parametrize("name", [*TWO_SETS, "supcon"])
def test_bad_weights_and_options(name: str) -> None:
    def call(**options: Any) -> None:
        losses.supcon(A, Y, **options) if name == "supcon" else TWO_SETS[name][0](A, B, **options)

    with pytest.raises(ValueError, match=r"sample_weight must have shape \(4,\), got \(3,\)"):
        call(sample_weight=torch.ones(3))
    with pytest.raises(TypeError, match=r"sample_weight must be one of torch.float32, .* got torch.int64"):
        call(sample_weight=torch.ones(4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"sample_weight must be a torch.Tensor, got list"):
        call(sample_weight=[1.0] * 4)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'batchmean'"):
        call(reduction="batchmean")


@pytest.mark.parametrize("name", TEMPERED)
def test_bad_temperature(name: str) -> None:
    for bad in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be .*, got {bad}"):
            TEMPERED[name](bad)
    with pytest.raises(TypeError, match="temperature must be a number or a tensor of one element, got str"):
        TEMPERED[name]("0.1")
    with pytest.raises(ValueError, match=r"temperature must be a floating tensor of one element, got .*\(2,\)"):
        TEMPERED[name](torch.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: losses.nt_xent(A, B, label_smoothing=1.0),
            ValueError,
            r"label_smoothing must be in \[0.0, 1.0\), got 1",
        ),
        (lambda: losses.nt_xent(A, B, label_smoothing=-0.1), ValueError, "label_smoothing must be in .*, got -0.1"),
        (lambda: losses.nt_xent(A, B, beta=-1.0), ValueError, "beta must be in .*, got -1.0"),
        (lambda: losses.nt_xent(A, B, tau_plus=1.0), ValueError, "tau_plus must be in .*, got 1.0"),
        (
            lambda: losses.nt_xent(A, B, beta=1.0, label_smoothing=0.1),
            ValueError,
            "label_smoothing is not defined with",
        ),
        (lambda: losses.nt_xent(A[:1], B[:1], beta=1.0), ValueError, r"at least two samples .* \(1, 3\)"),
        (lambda: losses.info_nce(A[:1], B[:1], tau_plus=0.1), ValueError, r"at least two samples .* \(1, 3\)"),
        (lambda: losses.dcl(A[:1], B[:1]), ValueError, r"at least two samples.* \(1, 3\)"),
        (lambda: losses.dcl(A, B, weight_fn=lambda a, b: a), ValueError, r"weight_fn must return shape \(4,\), got"),
        (lambda: losses.dcl(A, B, weight_fn=lambda a, b: 1.0), TypeError, "result of weight_fn must be a torch.Tensor"),
        (
            lambda: losses.info_nce(A, B, A[0]),
            ValueError,
            r"negative_keys must be \(M, D\) or \(N, M, D\), got .*\(3,\)",
        ),
        (
            lambda: losses.info_nce(A, B, A[:, :2]),
            ValueError,
            r"negative_keys must have as many features as query \(3\)",
        ),
        (lambda: losses.info_nce(A, B, A[None]), ValueError, r"negative_keys must have as many rows as query \(4\)"),
        (lambda: losses.info_nce(A, B, A[:0]), ValueError, r"negative_keys must not be empty, got shape \(0, 3\)"),
        (lambda: losses.info_nce(A, B, A.long()), TypeError, "negative_keys must have a floating dtype"),
        (lambda: losses.info_nce(A, B, MemoryQueue(8, 5).keys), ValueError, r"as many features as query .*\(8, 5\)"),
        (lambda: losses.info_nce(A, B, MemoryQueue(8, 3)), TypeError, "negative_keys must be a torch.Tensor, got Mem"),
        (lambda: losses.clip_loss(A, B, math.inf), ValueError, "logit_scale must be finite, got inf"),
        (lambda: losses.clip_loss(A, B, torch.ones(2)), ValueError, "logit_scale must be a floating tensor of one"),
        (lambda: losses.clip_loss(A, B, None), TypeError, "logit_scale must be a number .* got NoneType"),
        (lambda: losses.clip_loss(A, B, 1.0, math.nan), ValueError, "logit_bias must be finite, got nan"),
        (lambda: losses.siglip_loss(A, B, math.nan), ValueError, "logit_scale must be finite, got nan"),
        (lambda: losses.siglip_loss(A, B, 1.0, -math.inf), ValueError, "logit_bias must be finite, got -inf"),
        (lambda: losses.siglip_loss(A, B, 1.0, torch.tensor(1)), ValueError, "logit_bias must be a floating tensor"),
        (lambda: losses.supcon(A, Y - 1), ValueError, "labels must not be negative, got -1"),
        (lambda: losses.supcon(A, Y[:3]), ValueError, r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: losses.supcon(A, Y.float()), TypeError, "labels must be one of torch.int64, got torch.float32"),
        (lambda: losses.supcon(A, None), ValueError, r"labels may be None only for views .* \(4, 3\)"),
        (
            lambda: losses.supcon(A[0], Y),
            ValueError,
            r"features must be \(N, D\), or views \(B, V, D\), got shape \(3,\)",
        ),
        (lambda: losses.supcon(A[:0], Y[:0]), ValueError, "features must not be an empty batch"),
        (lambda: losses.supcon(A[:, None][:, :0]), ValueError, r"features must not be an empty batch.* \(4, 0, 3\)"),
        (lambda: losses.supcon(A.long(), Y), TypeError, "features must have a floating dtype"),
        (lambda: losses.mises_fisher_weights(A, B, 0.0), ValueError, "sigma must be positive and finite, got 0.0"),
        (lambda: losses.NTXentLoss(0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (lambda: losses.NTXentLoss(torch.tensor(0.1)), TypeError, "nn.Parameter to be learned, got a plain tensor"),
        (lambda: losses.NTXentLoss(gather_distributed=True), NotImplementedError, "gather_distributed=True"),
        (lambda: losses.NTXentLoss(memory_bank_size=-1), ValueError, "memory_bank_size must be .* got -1"),
        (lambda: losses.NTXentLoss(memory_bank_size=(4, 3, 2)), ValueError, r"memory_bank_size .* got \(4, 3, 2\)"),
        (lambda: losses.NTXentLoss(memory_bank_size=(8, 5))(A, B), ValueError, r"as many features as query .*\(8, 5\)"),
        (lambda: losses.NTXentLoss(reduction="max"), ValueError, "reduction must be one of"),
        (lambda: losses.DCLLoss(gather_distributed=True), NotImplementedError, "gather_distributed=True"),
        (lambda: losses.DCLWLoss(sigma=-1.0), ValueError, "sigma must be positive and finite, got -1.0"),
        (lambda: losses.SupConLoss(label_smoothing=2.0), ValueError, "label_smoothing must be in"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.fixture
def dtensor() -> Iterator[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(A, init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def test_a_dtensor_is_refused_with_the_remedy(dtensor: Tensor) -> None:
    for loss, first, second in TWO_SETS.values():
        with pytest.raises(TypeError, match=rf"{first} is a DTensor.*pass {first}.to_local\(\)"):
            loss(dtensor, B)
        with pytest.raises(TypeError, match=rf"{second} is a DTensor"):
            loss(A, dtensor)
    with pytest.raises(TypeError, match="negative_keys is a DTensor"):
        losses.info_nce(A, B, dtensor)
    with pytest.raises(TypeError, match="features is a DTensor"):
        losses.supcon(dtensor, Y)
    with pytest.raises(TypeError, match="keys is a DTensor"):
        MemoryQueue(8, 3)(dtensor)


def test_compiled_negative_labels_give_nan_in_their_rows() -> None:
    rows = torch.compile(losses.supcon, backend="eager", fullgraph=True)(A, Y - 1, reduction="none")
    assert rows.isnan().tolist() == [True, True, False, False]


def test_shapes_on_fakes_beyond_any_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = (torch.empty(2**20, 8, requires_grad=True) for _ in range(2))
        for loss in (losses.nt_xent, losses.info_nce, losses.dcl, lambda x, y: losses.clip_loss(x, y, 2.0)):
            value = loss(a, b)
            value.backward()
            assert value.shape == ()
            assert a.grad.shape == (2**20, 8)
        assert losses.supcon(a, torch.zeros(2**20, dtype=torch.long), reduction="none").shape == (2**20,)
