# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from sslkernels.evaluation import extract_features, knn_accuracy, linear_probe
from sslkernels.nn import ResidualCNN


def angles(*degrees: float) -> torch.Tensor:
    """Vectors at these angles, of different lengths: only the angle may count."""
    radians = torch.tensor(degrees) * (math.pi / 180)
    return torch.stack([radians.cos(), radians.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_neighbours_vote_by_similarity():
    """Of three neighbours, one at 10 degrees outweighs two at 40: exp((cos 10 - cos 40) / 0.07) = 22.9 > 2."""
    train, labels = angles(10, 40, 40, 170), torch.tensor([1, 0, 0, 2])
    query = angles(0)
    assert knn_accuracy(train, labels, query, torch.tensor([1]), k=3) == 1
    # At temperature 1 the weights are nearly equal, exp(0.22) = 1.2 < 2, and the majority wins.
    assert knn_accuracy(train, labels, query, torch.tensor([1]), k=3, temperature=1.0) == 0
    assert knn_accuracy(train, labels, query, torch.tensor([0]), k=3, temperature=1.0) == 1


def test_chunks_do_not_change_the_share():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 6, generator=generator), torch.randn(23, 6, generator=generator)
    labels, test_labels = torch.arange(50) % 4, torch.arange(23) % 4
    whole = knn_accuracy(train, labels, test, test_labels, k=7)
    assert 0 < whole < 1
    assert whole == knn_accuracy(train, labels, test, test_labels, k=7, chunk_size=5)
    # A class that only the test has can't be found, and is not an index out of range.
    assert knn_accuracy(train, labels, test, torch.full_like(test_labels, 9), k=7) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 11}, "k must be between 1 and the 10"),
        ({"temperature": 0.0}, "temperature"),
        ({"test_features": torch.zeros(3, 5)}, r"\(10, 4\) and \(3, 5\)"),
        ({"test_features": torch.zeros(0, 4), "test_labels": torch.zeros(0, dtype=torch.long)}, "empty"),
        ({"train_labels": torch.zeros(9, dtype=torch.long)}, "labels"),
    ],
)
def test_refuses(change, match):
    arguments = {
        "train_features": torch.ones(10, 4),
        "train_labels": torch.zeros(10, dtype=torch.long),
        "test_features": torch.ones(3, 4),
        "test_labels": torch.zeros(3, dtype=torch.long),
        "k": 5,
    }
    with pytest.raises(ValueError, match=match):
        knn_accuracy(**{**arguments, **change})


def test_features_are_taken_in_evaluation_mode():
    torch.manual_seed(0)
    backbone = ResidualCNN(in_chans=1, channels=(8,))
    backbone.bn.eval()  # a frozen part stays frozen
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.rand(7, 1, 8, 8)
    features = extract_features(backbone, images, batch_size=3)
    assert not features.requires_grad
    torch.testing.assert_close(features, backbone.eval()(images))
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_modes_are_put_back():
    backbone = ResidualCNN(in_chans=1, channels=(8,))
    backbone.bn.eval()
    extract_features(backbone, torch.rand(2, 1, 8, 8))
    assert backbone.training and not backbone.bn.training
    with pytest.raises(RuntimeError):
        extract_features(backbone, torch.rand(2, 3, 8, 8))
    assert backbone.training and not backbone.bn.training


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
    assert linear_probe(*parts) > 0.9 > 0.65 > knn_accuracy(*parts, k=5)


def test_linear_probe_refuses():
    good = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="ridge"):
        linear_probe(*good, ridge=0)
    with pytest.raises(ValueError, match="labels"):
        linear_probe(good[0], good[3], *good[2:])
