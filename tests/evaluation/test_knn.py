# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sslkernels.evaluation import KNNClassifier, knn_accuracy, merge_neighbors


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
        ({"k": 11}, r"k must be in \[1, 10\], got 11"),
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


def of_dino(train, labels, test, truth, k, temperature, classes):
    """DINO's evaluation, item by item, in float64: shares right at first, and within min(5, k); equals by class."""
    train, test = F.normalize(train.double(), dim=1), F.normalize(test.double(), dim=1)
    right = {1: 0, 5: 0}
    for item, own in zip(test, truth, strict=True):
        similarity = train @ item
        votes = [0.0] * classes
        for j in similarity.argsort(descending=True, stable=True)[:k].tolist():
            votes[labels[j]] += math.exp(similarity[j] / temperature)
        ranked = sorted(range(classes), key=lambda c: -votes[c])  # stable: the smaller class first
        right[1] += ranked[0] == int(own)
        right[5] += int(own) in ranked[: min(5, k)]
    return {t: count / len(test) for t, count in right.items()}


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 70), m=st.integers(1, 30), classes=st.integers(1, 9), seed=st.integers(0, 99), drop=st.booleans()
)
def test_is_dinos_evaluation(n, m, classes, seed, drop):
    """At several k from one search; fewer items than DINO's 100 chunks, classes that training or test lack."""
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, 6, generator=generator), torch.randn(m, 6, generator=generator)
    labels, truth = (torch.randint(classes, (x,), generator=generator) for x in (n, m))
    if drop:
        truth[:] = truth[0]
    ks = [k for k in (20, 1, 3, 10) if k <= n]
    knn = KNNClassifier(ks, num_classes=classes).fit(train, labels)
    result = knn.accuracy(test, truth)
    for k in ks:
        assert result[k] == pytest.approx(of_dino(train, labels, test, truth, k, 0.07, classes), abs=1e-12), k
        assert result[k][1] == float((knn.predict(test, k=k) == truth).double().mean())
        assert result[k][1] == knn_accuracy(train, labels, test, truth, k=k)


def test_streams():
    """A bank that grows, and test items that come in batches: the same as the whole of both."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(90, 6, generator=generator), torch.randn(41, 6, generator=generator)
    labels, truth = torch.arange(90) % 7, torch.arange(41) % 7
    whole = KNNClassifier((5, 20)).fit(train, labels)
    grown = KNNClassifier((5, 20))
    for part, own in zip(train.tensor_split(4), labels.tensor_split(4)):
        grown.add(part, own)
        if len(grown) > 50:
            grown.predict(test[:2])  # a question before the bank is whole
    assert len(grown) == 90
    pairs = zip(test.tensor_split(3), truth.tensor_split(3))
    assert grown.accuracy(pairs) == whole.accuracy(test, truth) == whole.accuracy(test, truth, chunk_size=1)
    assert torch.equal(grown.predict(test), whole.predict(test, chunk_size=4))
    assert len(grown.fit(train[:30], labels[:30])) == 30


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), k=st.integers(1, 40), seed=st.integers(0, 9))
def test_shards_merge_to_the_whole(sizes, k, seed):
    """A33, with many ties: unit axes as members make every similarity exact, so that neighbours agree bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    bank = torch.eye(4)[torch.randint(4, (n,), generator=generator)]
    labels = torch.arange(n)
    queries = torch.randn(5, 4, generator=generator)
    whole = KNNClassifier(k).fit(bank, labels).neighbors(queries)
    parts = [KNNClassifier(k).fit(*part).neighbors(queries) for part in zip(bank.split(sizes), labels.split(sizes))]
    merged = merge_neighbors(parts, k)
    assert torch.equal(merged[0], whole[0]) and torch.equal(merged[1], whole[1])


def test_votes_of_merged_neighbors_know_classes_of_other_shards():
    shards = [KNNClassifier(1).fit(torch.eye(4)[i : i + 1], torch.tensor([i])) for i in range(4)]
    merged = merge_neighbors([shard.neighbors(torch.eye(4)) for shard in shards], 1)
    ((k, votes),) = shards[0].votes(*merged)
    assert k == 1 and votes.argmax(1).tolist() == [0, 1, 2, 3]


def test_ties_go_to_the_smaller_class():
    knn = KNNClassifier((2, 4)).fit(torch.ones(4, 3), torch.tensor([3, 1, 3, 1]))
    assert knn.predict(torch.ones(1, 3)).tolist() == [1]
    result = knn.accuracy(torch.ones(2, 3), torch.tensor([1, 3]), top=(1, 2))
    assert result == {2: {1: 0.5, 2: 1.0}, 4: {1: 0.5, 2: 1.0}}


def test_what_is_not_a_number_is_never_right():
    train, labels = torch.randn(30, 4), torch.arange(30) % 6
    test = train.clone()
    test[:10] = math.nan
    assert KNNClassifier(1).fit(train, labels).accuracy(test, labels)[1][1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_takes_other_floats(dtype):
    """As if what the 16 bits hold had come in float32."""
    train, test = torch.randn(50, 8).to(dtype), torch.randn(20, 8).to(dtype)
    labels, truth = torch.arange(50) % 5, torch.arange(20) % 5
    assert knn_accuracy(train, labels, test, truth, k=7) == knn_accuracy(
        train.float(), labels, test.float(), truth, k=7
    )


def test_repeats_bit_for_bit(threads):
    knn = KNNClassifier(10).fit(torch.randn(500, 16), torch.arange(500) % 11)
    test = torch.randn(100, 16)
    first = knn.neighbors(test)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(knn.neighbors(test), first))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: KNNClassifier([]), ValueError, "k must be"),
        (lambda: KNNClassifier([5, 0]), ValueError, "k must be at least 1, got 0"),
        (lambda: KNNClassifier(num_classes=0), ValueError, "num_classes"),
        (lambda: KNNClassifier().predict(torch.ones(2, 3)), ValueError, "the bank is empty"),
        (lambda: small().predict(torch.ones(2, 3)), ValueError, "between 1 and the 4 members of the bank, got 5"),
        (lambda: small().predict(torch.ones(2, 3), k=2), ValueError, r"k must be one of \(1, 5\), got 2"),
        (lambda: small().neighbors(torch.ones(2, 4)), ValueError, "as many features as features"),
        (lambda: small().add(torch.ones(2, 5), torch.zeros(2).long()), ValueError, r"3 wide.* got shape \(2, 5\)"),
        (lambda: small().add(torch.ones(2, 3), torch.tensor([0, 9])), ValueError, r"num_classes \(6\), got 9"),
        (lambda: small().add(torch.ones(2, 3), torch.tensor([0, -1])), ValueError, "from 0, got -1"),
        (lambda: small().add(torch.ones(2, 3), torch.ones(2)), TypeError, "labels must be one of torch.int64"),
        (lambda: small().add(torch.ones(2, 3).long(), torch.ones(2)), TypeError, "features must have a floating"),
        (lambda: small().accuracy([]), ValueError, "features must not be empty"),
        (lambda: small().accuracy(torch.ones(2, 3)), TypeError, "labels must come with"),
        (lambda: small().accuracy(torch.ones(2, 3), torch.zeros(2).long(), top=(0,)), ValueError, "top"),
    ],
)
def test_the_classifier_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()


def small() -> KNNClassifier:
    return KNNClassifier((1, 5), num_classes=6).fit(torch.eye(4, 3), torch.arange(4))
