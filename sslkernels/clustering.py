# SPDX-License-Identifier: Apache-2.0
"""k-means by Lloyd's iterations, on `nearest`: the pseudo-labels of HuBERT, a first codebook, prototypes.

The same seed gives the same clusters on one device and number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.ops.neighbors import nearest
from sslkernels.reference._precision import compute_dtype, full_precision

__all__ = ["Clusters", "KMeans", "kmeans"]

CHUNK = 1 << 16  # rows that are visited at a time
SEEDED_FROM = 64  # rows a cluster that k-means++ looks at


class Clusters(NamedTuple):
    """What `kmeans` finds: centroids (k, D), labels (N,) int64, inertia (), iterations that were made."""

    centroids: Tensor
    labels: Tensor
    inertia: Tensor
    iterations: int


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    *,
    iterations: int = 20,
    init: str | Tensor = "k-means++",
    tolerance: float = 1e-4,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Clusters:
    """k centroids that the rows of x lie close to.

        repeat: label_i = argmin_c |x_i - c|^2,  centroid_c = mean of the rows labelled c
        inertia = sum_i |x_i - centroid_label_i|^2

    Rows are visited in chunks: beside x there are N labels and distances, and a few numbers a centroid. A centroid that
    no row chose moves to the row that is farthest from its own, the next one to the next. Means are taken of the
    differences from the centroid before.

    Args:
        x: (N, D), any floating dtype, finite.
        k: 1 to N.
        iterations: at most; 0 only labels the rows by `init`.
        init: "k-means++" (greedy: the best of 2 + log k draws), from a random sample where x has more than 64 k rows;
            "random", k rows; or centroids (k, D).
        tolerance: stop where the centroids' squared moves sum to at most this share of the columns' mean variance, or
            no label changes.
        seed, generator: of the initial centroids.

    Returns:
        `Clusters`; centroids and inertia in float32 (float64 if x is). The labels are those of the centroids returned.

    Raises:
        ValueError, TypeError: shapes, dtypes or numbers other than above; values that are not finite.

    Example:
        >>> centroids, labels, inertia, _ = kmeans(torch.randn(1000, 16), 10, seed=0)
        >>> centroids.shape, labels.shape
        (torch.Size([10, 16]), torch.Size([1000]))

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007; scikit-learn `KMeans` for tolerance and greedy draws.
    """
    check.features(x=x)
    check.integer("k", k, 1)
    check.integer("iterations", iterations, 0)
    check.in_range("tolerance", tolerance, 0.0, math.inf)
    if k > x.shape[0]:
        raise ValueError(f"k must be at most the {x.shape[0]} rows of x, got {k}")
    x = x.detach()
    variance = _variance(x)
    if not math.isfinite(variance):
        raise ValueError("x must be finite, got NaN or infinity")
    draws = torch.Generator(x.device).manual_seed(int(seed_tensor(seed, generator, x.device)) % 2**63)
    centroids = _initial(x, k, init, draws)
    labels, distances = _assign(x, centroids)
    done = 0
    while done < iterations:
        moved = _means(x, labels, distances, centroids).to(centroids.dtype)
        shift = float((moved - centroids).double().square().sum())
        centroids, before, done = moved, labels, done + 1
        labels, distances = _assign(x, centroids)
        if shift <= tolerance * variance or torch.equal(labels, before):
            break
    return Clusters(centroids, labels, distances.double().sum().to(centroids.dtype), done)


def _variance(x: Tensor) -> float:
    """Mean over the columns of their variances, in two passes."""
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in x.split(CHUNK)) / len(x)
    squares = sum(float((chunk - mean).square().sum()) for chunk in x.split(CHUNK))
    return squares / max(1, x.numel())


def _initial(x: Tensor, k: int, init: Any, draws: torch.Generator) -> Tensor:
    if isinstance(init, Tensor):
        check.features(x=x, init=init)
        if init.shape[0] != k:
            raise ValueError(f"init must have k = {k} rows, got shape {tuple(init.shape)}")
        if not init.isfinite().all():
            raise ValueError("init must be finite, got NaN or infinity")
        return init.detach().to(compute_dtype(x), copy=True)
    check.choice("init", init, ("k-means++", "random"))
    count = k if init == "random" else min(len(x), SEEDED_FROM * k)
    chosen = torch.randperm(len(x), generator=draws, device=x.device)[:count]
    sample = x[chosen].to(compute_dtype(x))
    return sample if init == "random" else _plus_plus(sample, k, draws)


def _plus_plus(x: Tensor, k: int, draws: torch.Generator) -> Tensor:
    """k rows of x, each drawn in proportion to its squared distance from those before, the best of several draws."""
    trials = 2 + int(math.log(k))
    centred = x - x.double().mean(0).to(x.dtype)
    lengths = centred.square().sum(1)
    chosen = [torch.randint(len(x), (1,), generator=draws, device=x.device)]
    with full_precision(x):
        closest = (centred - centred[chosen[0]]).square().sum(1)
        for _ in range(k - 1):
            heap = closest.cumsum(0, dtype=torch.float64)
            spots = torch.rand(trials, generator=draws, device=x.device, dtype=torch.float64) * heap[-1]
            drawn = torch.searchsorted(heap, spots, right=True).clamp_max(len(x) - 1)
            distance = lengths[drawn, None] + lengths - 2 * (centred[drawn] @ centred.T)  # (trials, N)
            distance = torch.minimum(distance.clamp_min_(0), closest)
            best = distance.sum(1, dtype=torch.float64).argmin().reshape(1)
            closest = distance[best[0]]
            closest[drawn[best]] = 0
            chosen.append(drawn[best])
    return x[torch.cat(chosen)]


def _assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and squared distances of all rows."""
    found = [nearest(chunk, centroids) for chunk in x.split(CHUNK)]
    return torch.cat([labels for _, labels in found]), torch.cat([distances for distances, _ in found])


def _means(x: Tensor, labels: Tensor, distances: Tensor, centroids: Tensor) -> Tensor:
    """Centroids (k, D) in float64: the mean of each cluster's rows, or the farthest rows where it has none."""
    k = len(centroids)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    counts = torch.bincount(labels, minlength=k)
    for chunk, own in zip(x.split(CHUNK), labels.split(CHUNK)):
        # rows of one cluster lie together in `order`: each sum belongs to one thread, in one order
        order = own.argsort(stable=True)
        starts = torch.searchsorted(own[order], torch.arange(k, device=x.device))
        # differences: a float32 sum of rows far from the origin would lose their digits
        sums += F.embedding_bag(order, chunk - centroids[own], starts, mode="sum")
    means = centroids + sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = x[distances.topk(len(empty)).indices].double()
    return means


class KMeans:
    """`kmeans` with scikit-learn's names, for tensors: fit, predict, fit_predict, cluster_centers_, labels_, inertia_.

    Args:
        n_clusters, init, max_iter, tol: k, init, iterations and tolerance of `kmeans`.
        n_init: how many starts; the one of least inertia stays.
        random_state: the seed; None draws one from torch.

    Example:
        >>> model = KMeans(10, random_state=0).fit(torch.randn(1000, 16))
        >>> model.predict(torch.randn(5, 16)).shape
        torch.Size([5])
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Tensor = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int | None = None,
    ) -> None:
        check.integer("n_clusters", n_clusters, 1)
        check.integer("n_init", n_init, 1)
        self.n_clusters, self.init, self.n_init = n_clusters, init, n_init
        self.max_iter, self.tol, self.random_state = max_iter, tol, random_state

    def fit(self, x: Tensor) -> KMeans:
        options: dict[str, Any] = {"iterations": self.max_iter, "init": self.init, "tolerance": self.tol}
        seeds = [None if self.random_state is None else self.random_state + i for i in range(self.n_init)]
        best = min((kmeans(x, self.n_clusters, seed=seed, **options) for seed in seeds), key=lambda c: float(c.inertia))
        self.cluster_centers_, self.labels_, self.n_iter_ = best.centroids, best.labels, best.iterations
        self.inertia_ = float(best.inertia)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """The label of each row of x (N, D)."""
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("KMeans must be fitted before it predicts; call fit first")
        check.features(cluster_centers_=self.cluster_centers_, x=x)
        return _assign(x.detach(), self.cluster_centers_)[0]

    def fit_predict(self, x: Tensor) -> Tensor:
        return self.fit(x).labels_
