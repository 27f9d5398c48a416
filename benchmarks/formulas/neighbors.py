# SPDX-License-Identifier: Apache-2.0
"""What must hold of neighbours: among rows that lie close together any order is right that float32 can't tell apart."""

import torch
from torch import Tensor

CHECKED = 512  # rows of queries that are compared with every key
TOLERANCE = 1e-5  # relative to the norms of a pair


def some(queries: Tensor) -> Tensor:
    """Rows from all over the queries."""
    return torch.linspace(0, len(queries) - 1, min(CHECKED, len(queries))).long()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.T).clamp(min=0)


def scale(queries: Tensor, keys: Tensor) -> Tensor:
    """What rounding of one score is relative to, for each query."""
    return TOLERANCE * (1 + queries.norm(dim=1)) * (1 + keys.norm(dim=1).max())


def top(result: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor, k: int, metric: str) -> str | None:
    """The k best keys of each query, best first: by dot product, or by squared distance."""
    values, indices = result
    if values.shape != (len(queries), k) or indices.shape != (len(queries), k):
        return f"got {tuple(values.shape)} and {tuple(indices.shape)}, expected {(len(queries), k)} twice"
    if indices.min() < 0 or indices.max() >= len(keys):
        return "an index is outside the keys"
    if (indices.sort(1).values.diff(dim=1) == 0).any():
        return "a key is there twice"
    rows = some(queries)
    q, every = queries[rows].double(), keys.double()
    scores = q @ every.T if metric == "dot" else -squared_distances(q, every)
    slack = (2 * scale(q, every))[:, None]
    got = scores.gather(1, indices[rows])
    claimed = values[rows].double() * (1 if metric == "dot" else -1)
    if not ((got - claimed).abs() <= slack).all():
        return f"a value is off by {(got - claimed).abs().max():.1e}"
    if not (claimed.diff(dim=1) <= 0).all():
        return "the best is not first"
    behind = scores.topk(k).values - got
    return None if (behind <= slack).all() else f"a neighbour is {behind.max():.1e} worse than the right one"


def nearest(indices: Tensor, queries: Tensor, keys: Tensor) -> str | None:
    """The index of the key at the smallest distance of each query."""
    if indices.shape != (len(queries),):
        return f"got {tuple(indices.shape)}, expected {(len(queries),)}"
    if indices.min() < 0 or indices.max() >= len(keys):
        return "an index is outside the keys"
    rows = some(queries)
    q, every = queries[rows].double(), keys.double()
    distances = squared_distances(q, every)
    behind = distances.gather(1, indices[rows, None])[:, 0] - distances.amin(1)
    return None if (behind <= 2 * scale(q, every)).all() else f"a key is {behind.max():.1e} farther than the nearest"


def koleo(x: Tensor, eps: float) -> Tensor:
    """-mean_i log(|u_i - u_n(i) + eps| + eps); u = x / |x|, n(i) the other row j with the largest <u_i, u_j>."""
    u = x / x.norm(dim=1, keepdim=True)
    with torch.no_grad():
        s = u @ u.T
        n = s.fill_diagonal_(-torch.inf).argmax(1)
    return -((u - u[n] + eps).norm(dim=1) + eps).log().mean()


def uniformity(x: Tensor, t: float) -> Tensor:
    """log mean_{i < j} exp(-t |x_i - x_j|^2)."""
    above = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return (-t * squared_distances(x, x)[above]).exp().mean().log()


def knn(
    queries: Tensor, keys: Tensor, labels: Tensor, truth: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Share of the queries whose class is the one of largest sum over the k best keys of exp(<q, key> / T)."""
    scores, indices = (queries @ keys.T).topk(k)
    votes = torch.zeros(len(queries), classes, dtype=queries.dtype)
    votes.scatter_add_(1, labels[indices], (scores / temperature).exp())
    return (votes.argmax(1) == truth).double().mean()
