# SPDX-License-Identifier: Apache-2.0
"""The comparison of word vectors with gensim's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import word_vectors as bench
from sslkernels import text


def test_agreement():
    a = torch.randn(bench.SIMILAR + 5, 20)
    rotation = torch.linalg.qr(torch.randn(20, 20)).Q
    assert bench.agreement(a, 3 * a @ rotation) == pytest.approx(1.0, abs=1e-4)
    assert abs(bench.agreement(a, torch.randn_like(a))) < 0.05


def test_both_train_the_same_words():
    sentences = [text.words(s) for document in text.lee_background()[:20] for s in document]
    vocabulary = text.Vocabulary(sentences, min_count=5)
    for train in (bench.of_ours, bench.of_gensim):
        if train is bench.of_gensim:
            pytest.importorskip("gensim")
        vectors = train(sentences, vocabulary, 0)
        assert vectors.inputs.shape == vectors.outputs.shape == (len(vocabulary), bench.DIM)
        assert vectors.outputs.any() and vectors.seconds > 0


def test_table():
    def found(speed: float, agreement: list[float]) -> dict[str, list[float]]:
        return {
            "words_per_second": [speed, 2 * speed], "simlex": [0.1, 0.2], "analogies": [0.01, 0.01],
            "contexts": [0.6, 0.62], "agreement": agreement,
        }  # fmt: skip

    scores = {bench.GENSIM: found(1e5, []), bench.OURS: found(3e5, [0.9])}
    lines = bench.table({"scores": scores}).splitlines()
    assert "| 3.00x | 0.150 ± 0.071 | 1.0 ± 0.0 | 61.0 ± 1.4 | 0.900 |" in lines[-1]
    assert lines[-2].endswith("| - |")
