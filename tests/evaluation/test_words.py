# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from sslkernels import text
from sslkernels.evaluation import context_accuracy, spearman, word_analogies, word_similarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spearman_is_scipys(dtype):
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 3, 50):
        x, y = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        ties = (2 * x).round()
        if len(ties.unique()) > 1:
            assert spearman(ties, y) == pytest.approx(stats.spearmanr(ties, y).statistic, abs=1e-12)
    assert math.isnan(spearman(torch.ones(3), torch.rand(3))) and math.isnan(spearman(x[:0], x[:0]))


def test_similarity_counts_the_pairs_it_knows(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("# a comment\na\tb\t9.0\na\tc\t1.0\nb\tc\t2.0\na\tzebra\t5.0\n")
    vectors = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0]])
    assert word_similarity(vectors, {"a": 0, "b": 1, "c": 2}, path) == (pytest.approx(1.0), 3, 4)  # by cosine
    assert word_similarity(-vectors[[0, 2, 1]], {"a": 0, "b": 1, "c": 2}, path).score < 1.0
    score, known, total = word_similarity(vectors, {"a": 0}, path)
    assert math.isnan(score) and (known, total) == (0, 4)


def test_analogies_leave_the_question_out(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text(": section\nMan King Woman Queen\nman king zebra queen\n: other\nking man queen woman\n")
    index = {"man": 0, "king": 1, "woman": 2, "queen": 3, "apple": 4}
    male, female, royal, fruit = torch.eye(4)
    vectors = torch.stack((male, male + royal, female, female + royal, fruit))
    assert word_analogies(vectors, index, path) == (1.0, 2, 3)
    # the first one's answer is elsewhere: nearest to b - a + c are b and c themselves, then the apple
    vectors[3], vectors[4] = -male, royal + female
    assert word_analogies(vectors, index, path) == (0.5, 2, 3)
    assert word_analogies(vectors, {"man": 0}, path)[1:] == (0, 3)


def test_contexts():
    n, d = 400, 8
    pairs = torch.arange(n)[:, None].expand(n, 2)
    u = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    assert context_accuracy(u, u, pairs) == 1.0
    assert context_accuracy(u, -u, pairs) == 0.0
    assert context_accuracy(u, torch.zeros_like(u), pairs) == 0.5
    assert abs(context_accuracy(u, torch.randn(n, d), pairs) - 0.5) < 5 * 0.5 / n**0.5
    assert context_accuracy(u, u, pairs, seed=1) == 1.0
    # a word that is everywhere scores high with all: no advantage
    always = torch.zeros(n, dtype=torch.int64)
    assert context_accuracy(u, u.abs() + 1, torch.stack((pairs[:, 0], always), 1)) == 0.5
    # two pairs are each other's comparison, none is its own
    assert context_accuracy(torch.eye(2), torch.eye(2), torch.tensor([[0, 0], [1, 1]])) == 1.0
    with pytest.raises(ValueError, match=r"pairs must have shape \(P, 2\) with P > 1"):
        context_accuracy(u, u, pairs[:1])


def test_the_files_that_gensim_ships():
    """As gensim counts them, on words of the corpus."""
    words = [text.words(s) for document in text.lee_background() for s in document]
    vocabulary = text.Vocabulary(words, min_count=5)
    vectors = torch.randn(len(vocabulary), 10)
    assert word_similarity(vectors, vocabulary.index)[1:] == (89, 999)
    assert word_analogies(vectors, vocabulary.index)[1:] == (146, 19544)
