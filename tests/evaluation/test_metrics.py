# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sslkernels import evaluation
from sslkernels.evaluation import Alignment, FeatureStd, RankMe, TeacherStudentCosine, Uniformity


def formula(name, x, y):
    """Each measure by its textbook definition, in float64, with nothing clever."""
    x, y = x.double(), y.double()
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    if name == "FeatureStd":
        return u.std(dim=0).mean()
    if name == "RankMe":
        sigma = torch.linalg.svdvals(x)
        p = sigma / sigma.sum() + 1e-7
        return (-p * p.log()).sum().exp()
    if name == "TeacherStudentCosine":
        return F.cosine_similarity(x, y).mean()
    if name == "Alignment":
        return (u - v).norm(dim=1).pow(2).mean()
    pairs = [(-2 * (u[i] - u[j]).square().sum()).exp() for i, j in itertools.combinations(range(len(u)), 2)]
    return torch.stack(pairs).mean().log()


METRICS = {
    "FeatureStd": (FeatureStd, evaluation.feature_std),
    "RankMe": (RankMe, evaluation.rankme),
    "TeacherStudentCosine": (TeacherStudentCosine, evaluation.teacher_student_cosine),
    "Alignment": (Alignment, evaluation.alignment),
    "Uniformity": (Uniformity, evaluation.uniformity),
}
# Uniformity's log-sum-exp is in float32, as its input here; all else is in float64 and agrees to rounding.
CLOSE = {"Uniformity": {"rtol": 1e-5, "atol": 1e-5}}
TO_ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def given_to(name, *tensors):
    return tensors[: METRICS[name][0].inputs]


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), d=st.integers(1, 20), seed=st.integers(0, 99))
def test_is_its_formula(name, n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + 0.3
    y = x + torch.randn(n, d, generator=generator)
    result = METRICS[name][1](*given_to(name, x, y))
    assert result.shape == () and result.dtype == torch.float64
    # singular values come from a Gram matrix, whose rounding an eps under the root turns into 1e-8
    close = {"rtol": 1e-6, "atol": 0} if name == "RankMe" else CLOSE.get(name, TO_ROUNDING)
    torch.testing.assert_close(result, formula(name, x, y), **close)


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_streams_and_merges_in_any_order(name, cuts, seed):
    """Batches of any size, empty ones too, one after the other, or each on its own and merged in another order."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 60, 7, generator=generator)
    kind, function = METRICS[name]
    parts = list(zip(*(t.tensor_split(sorted(cuts)) for t in (x, y))))
    streamed = kind()
    merged = kind()
    for pair in parts:
        streamed.update(*given_to(name, *pair))
    for i in torch.randperm(len(parts), generator=generator):
        merged.merge(pickle.loads(pickle.dumps(kind().update(*given_to(name, *parts[i])))))
    whole = function(*given_to(name, x, y))
    torch.testing.assert_close(streamed.compute(), whole, **CLOSE.get(name, TO_ROUNDING))
    torch.testing.assert_close(merged.compute(), whole, **CLOSE.get(name, TO_ROUNDING))
    assert streamed.count == merged.count == 60
    assert torch.equal(streamed.compute(), streamed.compute())
    streamed.reset()
    streamed.update(*given_to(name, x[:, :5], y[:, :5]))  # another width after a reset
    torch.testing.assert_close(streamed.compute(), function(*given_to(name, x[:, :5], y[:, :5])), **TO_ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METRICS)
def test_takes_other_floats(name, dtype):
    """16-bit rows are made wide before anything is computed: all that is lost is what the input lacks."""
    x, y = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = METRICS[name][1](*given_to(name, x, y))
    torch.testing.assert_close(result, formula(name, x, y), **CLOSE.get(name, {"rtol": 1e-7, "atol": 1e-7}))


@pytest.mark.parametrize("name", METRICS)
def test_strides_and_gradients_do_not_matter(name):
    x, y = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(2))
    strided = METRICS[name][1](*given_to(name, x.T.requires_grad_(), y.T))
    assert not strided.requires_grad
    torch.testing.assert_close(strided, METRICS[name][1](*given_to(name, x.T.contiguous(), y.T.contiguous())))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_shows(name, bad):
    x = torch.randn(20, 4)
    x[3, 1] = bad
    assert METRICS[name][1](*given_to(name, x, x)).isnan()


def test_a_mean_far_from_zero_does_not_drown_the_deviation():
    """Sums and sums of squares in float32 give nonsense here; batches whose means differ count their difference."""
    generator = torch.Generator().manual_seed(0)
    x = 1e3 + 1e-2 * torch.randn(4096, 8, generator=generator)
    x[:1000] += 0.05
    metric = FeatureStd(normalize=False)
    for part in x.split(100):
        metric.update(part)
    expected = x.double().std(dim=0).mean()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-10, atol=0)
    naive = (x.square().mean(dim=0) - x.mean(dim=0).square()).clamp(min=0).sqrt().mean()
    assert abs(naive / expected - 1) > 0.1


def test_fewer_rows_than_dimensions():
    """The D x D matrix has D - N eigenvalues of rounding, each of which would add 1e-7 log 1e-7 to the entropy."""
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(RankMe().update(x).compute(), formula("RankMe", x, x), rtol=1e-6, atol=0)


def test_healthy_and_collapsed_values():
    """What docs/evaluation.md says."""
    generator = torch.Generator().manual_seed(0)
    n, d = 2000, 64
    healthy, other = torch.randn(2, n, d, generator=generator)
    point = torch.randn(1, d, generator=generator).expand(n, d) * (1 + torch.rand(n, 1, generator=generator))
    line = torch.randn(n, 3, generator=generator) @ torch.randn(3, d, generator=generator)  # three directions
    assert evaluation.feature_std(healthy) == pytest.approx(d**-0.5, rel=0.02)
    assert evaluation.feature_std(point) < 1e-6
    assert evaluation.rankme(healthy) > 0.95 * d
    assert evaluation.rankme(point) == pytest.approx(1, rel=1e-3)
    assert 2.5 < evaluation.rankme(line) < 3.01
    assert abs(evaluation.teacher_student_cosine(healthy, other)) < 0.02
    assert evaluation.alignment(healthy, other) == pytest.approx(2, rel=0.02)
    assert evaluation.alignment(healthy, 5 * healthy) < 1e-12
    assert evaluation.uniformity(healthy) == pytest.approx(-4 * (1 - 2 / d), rel=0.01)
    assert evaluation.uniformity(point) == pytest.approx(0, abs=1e-5)


def test_options():
    x, y = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(3)).double()
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    torch.testing.assert_close(evaluation.alignment(x, y, alpha=1), (u - v).norm(dim=1).mean())
    torch.testing.assert_close(evaluation.uniformity(x, t=0.5), F.pdist(u).square().mul(-0.5).exp().mean().log())
    torch.testing.assert_close(evaluation.feature_std(x, normalize=False), x.std(dim=0).mean())


def test_extreme_scales():
    """Rows of 1e-30 and of 1e30 are rows: squares taken before they are made wide would be 0 and inf."""
    x, y = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(3))
    for scale in (1e-30, 1e30):
        for name, (_, function) in METRICS.items():
            expected = function(*given_to(name, x, y))
            torch.testing.assert_close(function(*given_to(name, scale * x, scale * y)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: FeatureStd().compute(), ValueError, "FeatureStd needs at least 2 items, got 0"),
        (lambda: evaluation.feature_std(torch.ones(1, 3)), ValueError, "at least 2 items, got 1"),
        (lambda: evaluation.rankme(torch.ones(0, 3)), ValueError, "features"),
        (lambda: RankMe().update(torch.ones(3)), ValueError, r"features must be 2-D .* got shape \(3,\)"),
        (lambda: RankMe().update(torch.ones(3, 2, dtype=torch.long)), TypeError, "features must have a floating"),
        (lambda: RankMe().update(torch.ones(3, 2)).update(torch.ones(3, 4)), ValueError, "must be 2 wide.* got 4"),
        (lambda: RankMe().merge(FeatureStd()), TypeError, "other must be a RankMe, got FeatureStd"),
        (lambda: Alignment(1.0).merge(Alignment(2.0)), ValueError, "options"),
        (lambda: Alignment().update(torch.ones(3, 2)), TypeError, "takes 2 tensors, got 1"),
        (lambda: evaluation.alignment(torch.ones(3, 2), torch.ones(4, 2)), ValueError, r"\(3, 2\), got \(4, 2\)"),
        (lambda: Alignment(alpha=0.0), ValueError, "alpha"),
        (lambda: Uniformity(t=-1.0), ValueError, "t must be positive"),
    ],
)
def test_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()
