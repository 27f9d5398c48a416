# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from sslkernels.evaluation import LinearProbe, knn_accuracy, linear_probe
from sslkernels.evaluation.probe import L2, _logistic


def test_linear_probe_is_ridge_regression():
    """Against the bordered normal equations, with an intercept that is not penalised, more items than dimensions and
    fewer."""
    for n, d in ((40, 6), (20, 50)):
        torch.manual_seed(n)
        features, labels = 3 * torch.randn(n, d) + 1, torch.randint(4, (n,))
        test, truth = 3 * torch.randn(30, d) + 1, torch.randint(4, (30,))
        scale = features.double().std(dim=0, correction=0)
        x = torch.cat([(features - features.mean(dim=0)) / scale, torch.ones(n, 1)], dim=1).double()
        y = torch.cat([(test - features.mean(dim=0)) / scale, torch.ones(30, 1)], dim=1).double()
        penalty = torch.diag(torch.tensor([0.1 * n] * d + [0.0], dtype=torch.float64))
        weight = torch.linalg.solve(x.T @ x + penalty, x.T @ torch.nn.functional.one_hot(labels, 4).double())
        expected = ((y @ weight).argmax(dim=1) == truth).double().mean()
        assert linear_probe(features, labels, test, truth, ridge=0.1) == expected


def test_linear_probe_finds_what_neighbours_miss():
    """One small coordinate decides, nine large ones are noise; a constant one does no harm."""
    torch.manual_seed(0)
    features = torch.cat([torch.randn(400, 9) * 10, torch.rand(400, 1) - 0.5, torch.ones(400, 1)], dim=1)
    labels = (features[:, 9] > 0).long()
    parts = features[:200], labels[:200], features[200:], labels[200:]
    assert all(linear_probe(*parts, classifier=how) > 0.9 for how in ("ridge", "logistic", "sgd"))
    assert knn_accuracy(*parts, k=5) < 0.65


def blobs(n, d=6, classes=4, seed=0):
    """Features that overlap, so that no classifier is perfect."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return 3 + centres[labels] + torch.randn(n, d, generator=generator), labels


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(l2):
    """Weight, intercept up to a constant over the classes, and the share of items that they name."""
    (train, labels), (test, truth) = blobs(200), blobs(300, seed=1)
    mean, std = train.double().mean(dim=0), train.double().std(dim=0, correction=0)
    x, y = ((part.double() - mean) / std for part in (train, test))
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    weight, bias = _logistic(x, labels, (l2,), torch.Generator())
    torch.testing.assert_close(weight.T, torch.from_numpy(theirs.coef_), rtol=1e-4, atol=1e-5)
    ours = bias - bias.mean()
    torch.testing.assert_close(
        ours, torch.from_numpy(theirs.intercept_ - theirs.intercept_.mean()), rtol=1e-4, atol=1e-5
    )
    share = linear_probe(train, labels, test, truth, classifier="logistic", l2=l2)
    assert share == theirs.score(y.numpy(), truth.numpy())


def test_the_penalty_is_chosen_by_training_items_alone():
    """Many dimensions of noise and few items: the weakest penalties lose. The choice is that of fits by hand."""
    generator = torch.Generator().manual_seed(1)
    train, labels = blobs(60)
    test, truth = blobs(500, seed=1)
    train, test = (torch.cat([part, torch.randn(len(part), 40, generator=generator)], dim=1) for part in (train, test))
    swept = linear_probe(train, labels, test, truth, classifier="logistic")

    mean, std = train.double().mean(dim=0), train.double().std(dim=0, correction=0)
    x = (train.double() - mean) / std
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    held, fit = order[:12], order[12:]
    right = []
    for l2 in L2:
        weight, bias = _logistic(x[fit], labels[fit], (l2,), generator)
        right.append(int(((x[held] @ weight + bias).argmax(dim=1) == labels[held]).sum()))
    assert right.index(max(right)) > 0 and max(right) > right[-1] and max(right) > right[0]
    best = L2[right.index(max(right))]
    assert swept == linear_probe(train, labels, test, truth, classifier="logistic", l2=best)
    assert swept == linear_probe(train, labels, test, truth, classifier="logistic")


@pytest.mark.parametrize("batch_norm", [True, False])
def test_heads_are_trained_as_torch_would_train_each(batch_norm):
    """Against nn.Linear, SGD with momentum, a cosine schedule and batch norm, one after the other, in float64."""
    steps, rates, size = 12, (0.01, 0.3, 0.05), 64
    probe = LinearProbe(
        6, 4, total_steps=steps, learning_rates=rates, batch_size=size, batch_norm=batch_norm,
        generator=torch.Generator().manual_seed(5),
    ).double()  # fmt: skip
    batches = [blobs(size, seed=step) for step in range(steps)]
    test = blobs(200, seed=100)
    heads = []
    for h, rate in enumerate(sorted(rates)):
        norm = nn.BatchNorm1d(6, eps=1e-6, affine=False) if batch_norm else nn.Identity()
        head = nn.Sequential(norm, nn.Linear(6, 4)).double()
        with torch.no_grad():
            head[1].weight.copy_(probe.weight[h])
            head[1].bias.zero_()
        optimizer = torch.optim.SGD(head[1].parameters(), lr=rate * size / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        heads.append((head, optimizer, schedule))
    for features, labels in batches:
        losses = probe.step(features, labels)
        for (head, optimizer, schedule), loss in zip(heads, losses, strict=True):
            expected = nn.functional.cross_entropy(head(features.double()), labels)
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            schedule.step()
    for h, (head, _, _) in enumerate(heads):
        torch.testing.assert_close(probe.weight[h], head[1].weight.detach(), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(probe.bias[h], head[1].bias.detach(), rtol=1e-8, atol=1e-12)
    expected = [float((h.eval()(test[0].double()).argmax(dim=1) == test[1]).double().mean()) for h, _, _ in heads]
    shares = probe.accuracies(*test)
    assert shares.tolist() == expected
    assert torch.equal(shares, probe.accuracies(zip(test[0].split(33), test[1].split(33)), chunk_size=10))


def trained_probe(**options):
    probe = LinearProbe(6, 4, total_steps=30, generator=torch.Generator().manual_seed(0), **options)
    for step in range(30):
        probe.step(*blobs(128, seed=step))
    return probe


def test_selects_the_best_head_and_the_slowest_among_equals():
    probe = trained_probe()
    held, test = blobs(400, seed=50), blobs(400, seed=51)
    shares = probe.accuracies(*held).tolist()
    assert probe.select(*held).best == shares.index(max(shares)) != 0
    assert probe.accuracy(*test) == probe.accuracies(*test)[probe.best]
    assert (probe(test[0]).argmax(1) == test[1]).double().mean() == probe.accuracy(*test)
    assert shares[0] < max(shares) - 0.1  # the slowest has not arrived
    tied = trained_probe(learning_rates=(0.1, 0.05))
    one = held[0][:1], tied.select(*held) and held[1][:1]
    if tied.accuracies(*one).unique().numel() == 1:
        assert tied.select(*one).best == 0 and tied.rates[0] < tied.rates[1]


def test_a_head_that_overflows_is_never_selected():
    probe = trained_probe(learning_rates=(0.05, 1e38), batch_norm=False)
    assert not probe.weight[1].isfinite().all()
    assert probe.accuracies(*blobs(100)).tolist()[1] == 0
    assert probe.select(*blobs(100)).best == 0


def test_the_probe_stops_and_resumes():
    probe = LinearProbe(6, 4, total_steps=10)
    for step in range(5):
        probe.step(*blobs(32, seed=step))
    resumed = LinearProbe(6, 4, total_steps=10)
    resumed.load_state_dict(copy.deepcopy(probe.state_dict()))
    for step in range(5, 10):
        assert torch.equal(probe.step(*blobs(32, seed=step)), resumed.step(*blobs(32, seed=step)))
    assert all(torch.equal(x, y) for x, y in zip(probe.state_dict().values(), resumed.state_dict().values()))


def test_fits_are_reproducible(threads):
    parts = (*blobs(60), *blobs(100, seed=1))
    for options in ({"classifier": "ridge"}, {"classifier": "logistic", "l2": 0.1}, {"classifier": "sgd", "epochs": 1}):
        assert linear_probe(*parts, **options) == linear_probe(*parts, **options)


@pytest.mark.parametrize("how", ["ridge", "logistic", "sgd"])
def test_16_bit_features_and_a_class_of_the_test_alone(how):
    (train, labels), (test, truth) = blobs(120), blobs(80, seed=1)
    expected = linear_probe(train.half().float(), labels, test.half().float(), truth, classifier=how)
    assert 0.5 < expected == linear_probe(train.half(), labels, test.half(), truth, classifier=how)
    assert linear_probe(train, labels, test, torch.full_like(truth, 9), classifier=how) == 0


def test_linear_probe_refuses():
    good = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="ridge"):
        linear_probe(*good, ridge=0)
    with pytest.raises(ValueError, match="labels"):
        linear_probe(good[0], good[3], *good[2:])
    with pytest.raises(ValueError, match="'svm'"):
        linear_probe(*good, classifier="svm")
    with pytest.raises(ValueError, match="l2"):
        linear_probe(*good, classifier="logistic", l2=(1.0, 0.0))
    with pytest.raises(ValueError, match="train_features must be at least 5 items"):
        linear_probe(*good, classifier="logistic")
    with pytest.raises(ValueError, match="epochs"):
        linear_probe(*good, classifier="sgd", epochs=0)
    with pytest.raises(ValueError, match="test_features must not be an empty batch"):
        linear_probe(*good[:2], good[2][:0], good[3][:0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: LinearProbe(0, 4, total_steps=1), ValueError, "dim must be at least 1"),
        (lambda p: LinearProbe(6, 4, total_steps=1, learning_rates=()), ValueError, "learning_rates must hold"),
        (lambda p: LinearProbe(6, 4, total_steps=1, learning_rates=(0.0,)), ValueError, "learning_rates must be pos"),
        (lambda p: LinearProbe(6, 4, total_steps=1, momentum=1.0), ValueError, "momentum"),
        (lambda p: p.step(torch.ones(3, 5), torch.zeros(3).long()), ValueError, r"6 wide, got shape \(3, 5\)"),
        (lambda p: p.step(torch.ones(3, 6), torch.full((3,), 4)), ValueError, r"below 4 \(num_classes\), got 4"),
        (lambda p: p.step(torch.ones(3, 6), torch.zeros(3)), TypeError, "labels must be one of torch.int64"),
        (lambda p: p.step(torch.ones(0, 6), torch.zeros(0).long()), ValueError, "features must not be an empty"),
        (lambda p: [p.step(*blobs(8)) for _ in range(3)], ValueError, "total_steps is 2"),
        (lambda p: p.select(torch.ones(0, 6), torch.zeros(0).long()), ValueError, "features must not be empty"),
    ],
)
def test_the_probe_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call(LinearProbe(6, 4, total_steps=2))
