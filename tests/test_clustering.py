# SPDX-License-Identifier: Apache-2.0
"""k-means: Lloyd's iterations written out, inertia beside scikit-learn's, empty clusters, seeds, bad input."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits
from torch import Tensor

from sslkernels import clustering
from sslkernels.clustering import KMeans, kmeans


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().data).float()


def written_out(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    for _ in range(iterations):
        labels = torch.cdist(x, centroids).argmin(1)
        centroids = torch.stack([x[labels == c].mean(0) for c in range(len(centroids))])
    return centroids, torch.cdist(x, centroids).argmin(1)


@pytest.mark.parametrize("chunk", [1 << 16, 100])
def test_iterations_written_out(digits: Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "CHUNK", chunk)
    x, start = digits.double(), digits[:12].double()
    for iterations in (0, 1, 5):
        found = kmeans(x, 12, iterations=iterations, init=start, tolerance=0.0)
        centroids, labels = written_out(x, start, iterations)
        torch.testing.assert_close(found.centroids, centroids)
        assert torch.equal(found.labels, labels) and found.iterations == iterations
        torch.testing.assert_close(found.inertia, (x - centroids[labels]).square().sum())
    assert torch.equal(start, digits[:12].double())  # the caller's centroids stay


def test_beside_scikit_learn(digits: Tensor) -> None:
    """From one start the same end, and the best of several starts as good."""
    start = digits[:10]
    ours = kmeans(digits, 10, iterations=300, init=start)
    theirs = SklearnKMeans(10, init=start.numpy(), n_init=1).fit(digits.numpy())
    assert float(ours.inertia) == pytest.approx(theirs.inertia_, rel=1e-4)
    best = KMeans(10, n_init=5, random_state=0).fit(digits).inertia_
    assert best <= 1.01 * SklearnKMeans(10, n_init=5, random_state=0).fit(digits.numpy()).inertia_


def test_separate_groups_are_found() -> None:
    """k-means++ puts one centroid in each of 20 groups far apart; random rows miss some."""
    middles = 100 * torch.randn(20, 8)
    x = (middles[:, None] + torch.randn(20, 50, 8)).flatten(0, 1)
    for seed in range(5):
        labels = kmeans(x, 20, seed=seed).labels.reshape(20, 50)
        assert (labels == labels[:, :1]).all() and labels[:, 0].unique().numel() == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(digits: Tensor, dtype: torch.dtype) -> None:
    """The digits are whole numbers to 16, exact in each dtype; a common offset of 1,000 is too but for 16 bits."""
    expected = kmeans(digits, 10, seed=3)
    found = kmeans(digits.to(dtype), 10, seed=3)
    assert found.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.inertia.float(), expected.inertia)
    far = kmeans(digits + 1000, 10, seed=3)
    torch.testing.assert_close(far.inertia, expected.inertia)


def test_same_seed_same_clusters(digits: Tensor, threads: int) -> None:
    first, again = (kmeans(digits, 30, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))
    assert not torch.equal(first.labels, kmeans(digits, 30, seed=6).labels)
    drawn = [kmeans(digits, 30, generator=torch.Generator().manual_seed(1)).inertia for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_starts_are_rows_of_x(init: str) -> None:
    """Also where k-means++ looks at a sample: 1,000 rows, 64 of them for one centroid."""
    x = torch.randn(1000, 4)
    for k in (1, 7):
        start = kmeans(x, k, iterations=0, init=init, seed=0).centroids
        assert all((x == row).all(1).any() for row in start)


def test_no_cluster_stays_empty() -> None:
    """Centroids that no row chose move to the farthest rows."""
    x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 100])
    found = kmeans(x, 4, init=torch.tensor([[0.0, 0.0], [1e6, 0.0], [1e6, 1.0], [1e6, 2.0]]), iterations=50)
    assert found.labels.unique().numel() == 4


def test_fewer_points_than_clusters() -> None:
    x = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    found = kmeans(x, 5, seed=0)
    assert found.inertia == 0 and found.centroids.isfinite().all()
    assert kmeans(x[:2], 2, seed=0).labels.unique().numel() == 2
    assert kmeans(torch.zeros(8, 3), 3).inertia == 0


def test_means_keep_their_digits() -> None:
    """100,000 rows of one cluster, 1e4 from the origin: a float32 sum of 1e9 knows no more than 64."""
    x = torch.randn(100_000, 2) + 1e4
    mean = kmeans(x, 1, seed=0).centroids[0]
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=0, atol=2e-3)


def test_class(digits: Tensor) -> None:
    model = KMeans(10, random_state=0)
    with pytest.raises(RuntimeError, match="fitted before it predicts"):
        model.predict(digits)
    labels = model.fit_predict(digits)
    assert torch.equal(labels, model.labels_) and torch.equal(model.predict(digits), labels)
    assert model.cluster_centers_.shape == (10, 64) and 0 < model.n_iter_ <= 300
    again = KMeans(10, random_state=0).fit(digits)
    assert again.inertia_ == model.inertia_
    assert KMeans(10, n_init=4, random_state=0).fit(digits).inertia_ <= model.inertia_
    assert model.predict(digits[:0]).shape == (0,)


X = torch.randn(6, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kmeans(X, 0), ValueError, "k must be at least 1, got 0"),
        (lambda: kmeans(X, 7), ValueError, "k must be at most the 6 rows of x, got 7"),
        (lambda: kmeans(X[0], 1), ValueError, "x must be 2-D"),
        (lambda: kmeans(X.int(), 1), TypeError, "x must have a floating dtype"),
        (lambda: kmeans(X / 0, 1), ValueError, "x must be finite, got NaN or infinity"),
        (lambda: kmeans(X, 2, init=X[:2] / 0), ValueError, "init must be finite, got NaN or infinity"),
        (lambda: kmeans(X, 2, iterations=-1), ValueError, "iterations must be at least 0"),
        (lambda: kmeans(X, 2, tolerance=-1.0), ValueError, "tolerance must be in"),
        (lambda: kmeans(X, 2, init="best"), ValueError, "init must be one of 'k-means++', 'random', got 'best'"),
        (lambda: kmeans(X, 2, init=X), ValueError, "init must have k = 2 rows, got shape (6, 2)"),
        (lambda: kmeans(X, 2, init=X[:2, :1]), ValueError, "init must have as many features as x (2)"),
        (lambda: kmeans(X, 2, seed=1, generator=torch.Generator()), ValueError, "one of seed and generator"),
        (lambda: KMeans(0), ValueError, "n_clusters must be at least 1"),
        (lambda: KMeans(2, n_init=0), ValueError, "n_init must be at least 1"),
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
