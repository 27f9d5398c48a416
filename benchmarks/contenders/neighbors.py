# SPDX-License-Identifier: Apache-2.0
"""Contenders for nearest neighbours: faiss and scikit-learn themselves, and the forms that are written in torch.

faiss's index and scikit-learn's arrays are made before the clock starts; both use as many threads as torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Contender, Inputs
from benchmarks.contenders.contrastive import LEAN, OURS

Top = tuple[Tensor, Tensor]
ROWS = 1024  # queries at a time
GROUP = 128  # keys whose best one is found first

# --- The k best --------------------------------------------------------------------------------------------------


def indexed(inputs: Inputs) -> Inputs:
    """The exhaustive index of faiss, which holds a copy of the keys."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    keys = inputs["keys"]
    flat = faiss.IndexFlatL2 if inputs.get("metric", "l2") == "l2" else faiss.IndexFlatIP
    index = flat(keys.shape[1])
    index.add(keys.numpy())
    return {"queries": inputs["queries"].numpy(), "index": index, "k": inputs.get("k", 1)}


def faiss_top(queries: Any, index: Any, k: int) -> Top:
    values, ids = index.search(queries, k)
    return torch.from_numpy(values), torch.from_numpy(ids)


def torch_top(queries: Tensor, keys: Tensor, k: int, metric: str) -> Top:
    if metric == "dot":
        return (queries @ keys.t()).topk(k)
    values, indices = torch.cdist(queries, keys).topk(k, largest=False)
    return values.square(), indices


def chunked_top(queries: Tensor, keys: Tensor, k: int, metric: str) -> Top:
    parts = [torch_top(rows, keys, k, metric) for rows in queries.split(ROWS)]
    values, indices = zip(*parts)
    return torch.cat(values), torch.cat(indices)


def lean_top(queries: Tensor, keys: Tensor, k: int, metric: str) -> Top:
    """Groups of keys: the k best lie within the k groups that have the best maxima."""
    size = min(GROUP, max(1, len(keys) // k))
    whole = len(keys) - len(keys) % size
    offsets = torch.arange(size)
    tail = torch.arange(whole, len(keys))
    norms = keys.square().sum(1) if metric == "l2" else None
    parts = []
    for rows in queries.split(ROWS):
        scores = rows @ keys.t() if norms is None else torch.addmm(norms, rows, keys.t(), beta=-1, alpha=2)
        groups = scores[:, :whole].unflatten(1, (-1, size)).amax(2).topk(k, sorted=False).indices
        ids = (groups[:, :, None] * size + offsets).flatten(1)
        ids = torch.cat([ids, tail.expand(len(rows), -1)], 1)
        values, places = scores.gather(1, ids).topk(k)
        values = values if norms is None else (rows.square().sum(1, keepdim=True) - values).clamp_(min=0)
        parts.append((values, ids.gather(1, places)))
    values, indices = zip(*parts)
    return torch.cat(values), torch.cat(indices)


def ours_top(queries: Tensor, keys: Tensor, k: int, metric: str) -> Top:
    from sslkernels.ops import topk_similarity

    return topk_similarity(queries, keys, k, metric=metric)


# --- The best one ------------------------------------------------------------------------------------------------


def arrays(inputs: Inputs) -> Inputs:
    from threadpoolctl import threadpool_limits

    threadpool_limits(torch.get_num_threads(), user_api="openmp")
    return {name: value.numpy() for name, value in inputs.items()}


def sklearn_nearest(queries: Any, keys: Any) -> Tensor:
    from sklearn.metrics import pairwise_distances_argmin

    return torch.from_numpy(pairwise_distances_argmin(queries, keys))


def torch_nearest(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(queries, keys).argmin(1)


def chunked_nearest(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.cat([torch_nearest(rows, keys) for rows in queries.split(ROWS)])


def lean_nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """|k|^2 - 2 <q, k>, without roots, into one buffer."""
    norms, found = keys.square().sum(1), queries.new_empty(len(queries), dtype=torch.long)
    buffer = queries.new_empty(min(ROWS, len(queries)), len(keys))
    for rows, out in zip(queries.split(ROWS), found.split(ROWS)):
        scores = torch.addmm(norms, rows, keys.t(), alpha=-2, out=buffer[: len(rows)])
        torch.argmin(scores, 1, out=out)
    return found


def ours_nearest(queries: Tensor, keys: Tensor) -> Tensor:
    from sslkernels.ops import nearest

    return nearest(queries, keys)[1]


# --- KoLeo -------------------------------------------------------------------------------------------------------


def lightly_koleo(x: Tensor, eps: float) -> Tensor:
    x = F.normalize(x, p=2, dim=-1, eps=eps)
    similarity = torch.mm(x, x.t())
    similarity.fill_diagonal_(-2)
    nearest = similarity.argmax(dim=1)
    return -(F.pairwise_distance(x, x[nearest], eps=eps) + eps).log().mean()


def dinov2_koleo(x: Tensor, eps: float) -> Tensor:
    x = F.normalize(x, eps=eps, p=2, dim=-1)
    dots = torch.mm(x, x.t())
    dots.view(-1)[:: len(x) + 1].fill_(-1)
    _, nearest = torch.max(dots, dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=eps) + eps).mean()


def lean_koleo(x: Tensor, eps: float) -> Tensor:
    """The search without autograd, some rows at a time."""
    u = F.normalize(x, dim=1, eps=eps)
    with torch.no_grad():
        found = []
        for start in range(0, len(u), ROWS):
            similarity = u[start : start + ROWS] @ u.t()
            similarity.diagonal(start).fill_(-2)
            found.append(similarity.argmax(1))
    return -(F.pairwise_distance(u, u[torch.cat(found)], eps=eps) + eps).log().mean()


def ours_koleo(x: Tensor, eps: float) -> Tensor:
    from sslkernels.losses import koleo_loss

    return koleo_loss(x, eps=eps)


# --- Evaluation --------------------------------------------------------------------------------------------------


def dino_knn(
    queries: Tensor, keys: Tensor, labels: Tensor, truth: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Chunks of 500, a hundredth of ImageNet's validation images; one row for each class and neighbour. Its sort gives
    top-5 too."""
    keys = keys.t()
    size, right = 500, 0
    one_hot = torch.zeros(k, classes)
    for start in range(0, len(queries), size):
        rows = queries[start : start + size]
        similarity = torch.mm(rows, keys)
        scores, ids = similarity.topk(k, largest=True, sorted=True)
        neighbours = torch.gather(labels.view(1, -1).expand(len(rows), -1), 1, ids)
        one_hot.resize_(len(rows) * k, classes).zero_()
        one_hot.scatter_(1, neighbours.view(-1, 1), 1)
        weights = scores.clone().div_(temperature).exp_()
        votes = torch.sum(torch.mul(one_hot.view(len(rows), -1, classes), weights.view(len(rows), -1, 1)), 1)
        predictions = votes.sort(1, True).indices
        right += predictions.eq(truth[start : start + size].view(-1, 1)).narrow(1, 0, 1).sum().item()
    return torch.tensor(right / len(queries))


def lean_knn(
    queries: Tensor, keys: Tensor, labels: Tensor, truth: Tensor, classes: int, k: int, temperature: float
) -> Tensor:
    """Votes are scattered, without a row for each class."""
    scores, ids = lean_top(queries, keys, k, "dot")
    votes = torch.zeros(len(queries), classes).scatter_add_(1, labels[ids], (scores / temperature).exp())
    return (votes.argmax(1) == truth).float().mean()


def bank(inputs: Inputs) -> Inputs:
    from sslkernels.evaluation import KNNClassifier

    classifier = KNNClassifier(inputs["k"], temperature=inputs["temperature"], num_classes=inputs["classes"])
    return {
        "queries": inputs["queries"], "truth": inputs["truth"], "k": inputs["k"],
        "bank": classifier.fit(inputs["keys"], inputs["labels"]),
    }  # fmt: skip


def ours_knn(queries: Tensor, truth: Tensor, k: int, bank: Any) -> Tensor:
    return torch.tensor(bank.accuracy(queries, truth)[k][1])


def align_uniform(x: Tensor, t: float) -> Tensor:
    return torch.pdist(x, p=2).pow(2).mul(-t).exp().mean().log()


def lean_uniformity(x: Tensor, t: float) -> Tensor:
    """Rows of norm 1: |x - y|^2 = 2 - 2 <x, y>. Every pair twice, and each row with itself, which adds 1."""
    n, total = len(x), 0.0
    for rows in x.split(ROWS):
        total += (2 * t * (rows @ x.t()) - 2 * t).exp_().sum(dtype=torch.float64)
    return ((total - n) / (n * (n - 1))).log().float()


def ours_uniformity(x: Tensor, t: float) -> Tensor:
    from sslkernels.evaluation import uniformity

    return uniformity(x, t=t)


FAISS = "faiss-cpu 1.15, IndexFlatIP or IndexFlatL2"
TOP = (
    Contender("sslkernels", ours_top, OURS),
    Contender("faiss", faiss_top, FAISS, prepare=indexed, real=True),
    Contender("torch", torch_top, "matmul (or cdist) and topk", real=True),
    Contender("torch-chunked", chunked_top, f"the same, {ROWS} queries at a time"),
    Contender("lean", lean_top, f"{LEAN}, the best of {GROUP} keys first"),
)  # fmt: skip
NEAREST = (
    Contender("sslkernels", ours_nearest, OURS),
    Contender("faiss", faiss_top, FAISS, prepare=indexed, result=lambda top: top[1][:, 0], real=True),
    Contender("scikit-learn", sklearn_nearest, "scikit-learn's pairwise_distances_argmin", prepare=arrays, real=True),
    Contender("torch", torch_nearest, "torch.cdist and argmin", real=True),
    Contender("torch-chunked", chunked_nearest, f"the same, {ROWS} queries at a time"),
    Contender("lean", lean_nearest, LEAN),
)  # fmt: skip
KOLEO = (
    Contender("sslkernels", ours_koleo, OURS),
    Contender("lightly", lightly_koleo, "lightly, loss/koleo_loss.py, KoLeoLoss"),
    Contender("dinov2", dinov2_koleo, "facebookresearch/dinov2, loss/koleo_loss.py"),
    Contender("lean", lean_koleo, LEAN),
)
FLIPS = 5e-3  # of the accuracy: queries whose vote float32 can't decide
KNN = (
    Contender("sslkernels", ours_knn, f"{OURS}, KNNClassifier", prepare=bank, limit=FLIPS),
    Contender("dino", dino_knn, "facebookresearch/dino, eval_knn.py, knn_classifier", limit=FLIPS),
    Contender("lean", lean_knn, LEAN, limit=FLIPS),
)
UNIFORMITY = (
    Contender("sslkernels", ours_uniformity, OURS),
    Contender("align_uniform", align_uniform, "SsnL/align_uniform, uniform_loss"),
    Contender("lean", lean_uniformity, LEAN),
)
