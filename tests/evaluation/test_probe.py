# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sslkernels.evaluation import knn_accuracy, linear_probe


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
