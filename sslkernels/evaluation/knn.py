# SPDX-License-Identifier: Apache-2.0
"""The vote of the nearest neighbours among frozen features, weighted as DINO does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.evaluation._labelled import Batches, batches, labelled, train_and_test
from sslkernels.ops import l2_normalize, topk_similarity


class KNNClassifier:
    """A bank of features, whose members nearest to an item vote for its class.

        s_ij  = cosine of item i and member j
        votes_ic = sum over the k members j of the largest s_ij, those of class c, of exp(s_ij / temperature)
        class_i  = argmax_c votes_ic                                    ties go to the smaller class

    Several k cost one search, that of the largest. No matrix of all items by all members is made. DINOv2's softmax over
    the neighbours scales all votes of an item alike, and ranks as this does.

    Source: facebookresearch/dino `eval_knn.py::knn_classifier`, without its fixed 1,000 classes and its 100 chunks.

    Args:
        k: number of neighbours, or several numbers (DINO: 10, 20, 100 and 200).
        temperature: of the votes.
        num_classes: by default as many as the largest label of the bank needs.

    Raises:
        ValueError, TypeError: features that are not (N, D) floating; labels that are not (N,) int64 from 0, or not
            below num_classes; a bank of fewer than k members; an option out of range.

    Example:
        >>> knn = KNNClassifier(k=(1, 3))
        >>> for _ in range(2):
        ...     _ = knn.add(torch.eye(4), torch.arange(4))
        >>> knn.predict(torch.eye(4) + 0.1)
        tensor([0, 1, 2, 3])
        >>> knn.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))[3][1]
        0.75
    """

    def __init__(
        self, k: int | Sequence[int] = 20, *, temperature: float = 0.07, num_classes: int | None = None
    ) -> None:
        self.k = (k,) if isinstance(k, int) else tuple(k)
        if not self.k:
            raise ValueError("k must be a number or several, got none")
        for number in self.k:
            check.integer("k", number, 1)
        check.positive("temperature", temperature)
        if num_classes is not None:
            check.integer("num_classes", num_classes, 1)
        self.temperature, self.num_classes = temperature, num_classes
        self._clear()

    def _clear(self) -> None:
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._classes = self.num_classes or 0

    def __len__(self) -> int:
        return sum(map(len, self._labels))

    def fit(self, features: Tensor, labels: Tensor) -> KNNClassifier:
        """Make features (N, D) with labels (N,) the whole bank."""
        self._clear()
        return self.add(features, labels)

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> KNNClassifier:
        """Put features (N, D) with labels (N,) into the bank, which keeps unit rows in float32."""
        labelled(features, labels)
        if self._features and features.shape[1] != self._features[0].shape[1]:
            width = self._features[0].shape[1]
            raise ValueError(f"features must be {width} wide, as the bank, got shape {tuple(features.shape)}")
        largest = int(labels.max()) if labels.numel() else -1
        if self.num_classes is not None and largest >= self.num_classes:
            raise ValueError(f"labels must be below num_classes ({self.num_classes}), got {largest}")
        self._classes = max(self._classes, largest + 1)
        self._features.append(l2_normalize(features.float()))
        self._labels.append(labels)
        return self

    @torch.no_grad()
    def neighbors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities and labels (M, K) of the nearest members, best first; K is the largest k, or the whole bank.

        Where each process holds a part of the bank, `merge_neighbors` makes one answer of theirs.
        """
        if not len(self):
            raise ValueError("the bank is empty: add features to it")
        if len(self._features) > 1:
            self._features, self._labels = [torch.cat(self._features)], [torch.cat(self._labels)]
        check.features(features=features, bank=self._features[0])
        count = min(max(self.k), len(self))
        similarity, index = topk_similarity(l2_normalize(features.float()), self._features[0], count, metric="dot")
        return similarity, self._labels[0][index]

    def votes(self, similarity: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(k, votes (M, C)) for each k from the smallest, given the neighbours; the next k adds to the same tensor."""
        if similarity.shape[1] < max(self.k):
            raise ValueError(
                f"k must be between 1 and the {similarity.shape[1]} members of the bank, got {max(self.k)}"
            )
        weight = (similarity.float() / self.temperature).exp()
        # neighbours that were merged may be of classes that this bank has not
        classes = max(self._classes, int(labels.max()) + 1 if labels.numel() else 0)
        votes = weight.new_zeros(len(weight), classes)
        done = 0
        for k in sorted(set(self.k)):
            votes.scatter_add_(1, labels[:, done:k], weight[:, done:k])
            yield k, votes
            done = k

    def predict(self, features: Tensor, *, k: int | None = None, chunk_size: int = 1024) -> Tensor:
        """Classes (M,) of features (M, D) by `k` neighbours: one of the numbers given, by default the first."""
        k = self.k[0] if k is None else k
        if k not in self.k:
            raise ValueError(f"k must be one of {self.k}, got {k}")
        found = []
        for chunk in features.split(chunk_size):
            found += [votes.argmax(dim=1) for other, votes in self.votes(*self.neighbors(chunk)) if other == k]
        return torch.cat(found)

    def accuracy(
        self,
        features: Tensor | Batches,
        labels: Tensor | None = None,
        *,
        top: Sequence[int] = (1, 5),
        chunk_size: int = 1024,
    ) -> dict[int, dict[int, float]]:
        """`accuracy[k][t]`: the share of items whose class is among the first t, by k neighbours.

        Features (M, D) with labels (M,), or an iterable of such pairs. As in DINO not more than k classes are among the
        first t, and classes without a vote follow in their order. A class that the bank lacks is never found.
        """
        for t in top:
            check.integer("top", t, 1)
        right = {k: dict.fromkeys(top, 0) for k in sorted(set(self.k))}
        total = 0
        for chunk, truth in batches(features, labels, chunk_size):
            for k, votes in self.votes(*self.neighbors(chunk)):
                place = place_of(truth, votes)
                for t in top:
                    right[k][t] += int((place < min(t, k)).sum())
            total += len(truth)
        if not total:
            raise ValueError("features must not be empty, got no item to classify")
        return {k: {t: count / total for t, count in counts.items()} for k, counts in right.items()}


def place_of(labels: Tensor, scores: Tensor) -> Tensor:
    """How many classes are ahead of the true one in scores (M, C), (M,): those that score more, and smaller equal ones.

    A label beyond the classes has all of them ahead of it, and so has one whose score is not a number.
    """
    classes = scores.shape[1]
    own = scores.gather(1, labels.clamp(max=classes - 1)[:, None])
    not_smaller = torch.arange(classes, device=scores.device) >= labels[:, None]
    behind = (scores < own) | ((scores == own) & not_smaller)  # itself too; of what is not a number neither holds
    return torch.where(labels < classes, classes - behind.sum(dim=1), classes)


def merge_neighbors(shards: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of the neighbours that each part of a bank has found: exactly those of the whole bank.

    Args:
        shards: (similarity, labels) as `KNNClassifier.neighbors` gives them, each (M, K_shard), in the bank's order,
            which decides between equals.
        k: how many to keep, or all there are.

    Example:
        >>> parts = [KNNClassifier(k=2).add(torch.eye(4)[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2)]
        >>> merge_neighbors([part.neighbors(torch.eye(4)) for part in parts], k=1)[1].flatten()
        tensor([0, 1, 2, 3])
    """
    similarity, labels = (torch.cat(parts, dim=1) for parts in zip(*shards, strict=True))
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarity.gather(1, order), labels.gather(1, order)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Share of test items whose class wins the vote of their k nearest training items: `KNNClassifier` in one call.

    Example:
        >>> eye = torch.eye(4)
        >>> knn_accuracy(eye, torch.arange(4), eye + 0.1, torch.arange(4), k=1)
        1.0
    """
    train_and_test(train_features, train_labels, test_features, test_labels)
    check.integer("k", k, 1, len(train_features))
    knn = KNNClassifier(k, temperature=temperature).fit(train_features, train_labels)
    return knn.accuracy(test_features, test_labels, top=(1,), chunk_size=chunk_size)[k][1]
