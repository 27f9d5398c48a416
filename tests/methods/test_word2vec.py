# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sslkernels import words
from sslkernels.evaluation import context_accuracy
from sslkernels.methods import Word2Vec
from sslkernels.methods.word2vec import flatten, keep_probability
from sslkernels.reference import tokens as reference


@pytest.fixture(scope="module")
def data() -> words.WordData:
    return words.word_pairs()


@pytest.fixture(scope="module")
def fitted(data) -> Word2Vec:
    torch.manual_seed(0)
    method = Word2Vec(data.vocabulary.counts, dim=64)
    method.fit(data.train_sentences, epochs=20)
    return method


def test_loss_is_the_formula():
    method = Word2Vec(torch.tensor([9, 5, 3, 1]), dim=6).double()
    torch.nn.init.normal_(method.output_weight)
    inputs, outputs = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([3, 0, 2, 2, 1])
    loss, metrics = method((inputs, outputs), generator=torch.Generator().manual_seed(5))
    draws = method.table.sample(5, 5, generator=torch.Generator().manual_seed(5))
    assert (draws == outputs[:, None]).any()  # so that some are skipped
    u, v, n = method.input_weight[inputs], method.output_weight[outputs], method.output_weight[draws]
    noise = F.softplus((n @ u[..., None]).squeeze(-1)) * (draws != outputs[:, None])
    expected = (F.softplus(-(u * v).sum(1)) + noise.sum(1)).mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"] == loss


def test_starts_as_the_original():
    method = Word2Vec(torch.ones(500), dim=20)
    assert not method.output_weight.any()
    weight = method.input_weight.detach()
    assert weight.abs().max() <= 0.5 / 20 and weight.std().item() == pytest.approx(1 / 20 / math.sqrt(12), rel=0.05)
    # word2vec.c: (sqrt(cn / (sample * train_words)) + 1) * (sample * train_words) / cn
    counts = torch.tensor([50.0, 5.0, 1.0, 0.0])
    expected = [min((math.sqrt(c / 0.56) + 1) * 0.56 / c, 1.0) if c else 1.0 for c in counts.tolist()]
    assert keep_probability(counts, 0.01).tolist() == pytest.approx(expected)
    assert keep_probability(counts, 0.0).tolist() == [1.0] * 4


def test_fit_is_the_original_loop():
    """Chunk by chunk with a falling learning rate, as the reference makes each: float64, to rounding."""
    torch.manual_seed(1)
    sentences = [torch.randint(30, (int(n),)) for n in torch.randint(1, 60, (900,))]
    counts = torch.cat(sentences).bincount(minlength=30)
    method = Word2Vec(counts, dim=5, sample=0.01).double()
    u, v = method.input_weight.detach().clone(), method.output_weight.detach().clone()
    tokens, offsets = flatten(sentences)
    method.fit(sentences[:300], epochs=2, generator=torch.Generator().manual_seed(3), lr=0.05)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3)))
    tokens, offsets = tokens[: offsets[300]], offsets[:301]
    assert len(tokens) < 10_000  # one chunk an epoch
    for epoch in range(2):
        lr = 0.05 * (1 - epoch * len(tokens) / (2 * len(tokens) + 1))
        now = torch.tensor(seed + 1 + epoch)
        reference.skipgram_update_(u, v, tokens, offsets, *method.table, method.keep.float(), now, lr, 5, 5, False)
    torch.testing.assert_close(method.input_weight.detach(), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(method.output_weight.detach(), v, rtol=0, atol=1e-12)


def test_long_sentences_are_cut_and_empty_ones_left_out():
    tokens, offsets = flatten([range(2500), [], [1, 2]])
    assert offsets.tolist() == [0, 1000, 2000, 2500, 2502] and tokens[-1] == 2
    with pytest.raises(ValueError, match="at least one word"):
        flatten([[], []])


@pytest.mark.parametrize("hogwild", [False, True])
def test_fit_learns_contexts(data, fitted, hogwild):
    method = fitted
    if hogwild:
        torch.manual_seed(0)
        method = Word2Vec(data.vocabulary.counts, dim=64)
        method.fit(data.train_sentences, epochs=20, hogwild=True)
    # 0.5 is chance, and the share has a standard deviation below 0.002
    assert context_accuracy(method.input_weight, method.output_weight, data.test_pairs) > 0.58


def test_similar_words(data, fitted):
    index = data.vocabulary.index
    asked = torch.tensor([index["israeli"], index["cricket"]])
    values, ids = fitted.most_similar(asked, k=10)
    unit = F.normalize(fitted.encode(torch.arange(len(index))).detach().double(), dim=1)
    exact = unit[asked] @ unit.T
    exact[torch.arange(2), asked] = -2.0
    best = exact.topk(10)
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(values.double(), best.values, rtol=0, atol=1e-6)
    assert "palestinian" in [data.vocabulary.words[i] for i in fitted.most_similar(asked, k=30)[1][0].tolist()]


def test_fit_is_the_same_again(data):
    weights = []
    for threads in (1, 2):
        torch.manual_seed(0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        method = Word2Vec(data.vocabulary.counts, dim=16)
        method.fit(data.train_sentences[:500], epochs=1)
        torch.set_num_threads(before)
        weights.append(method.input_weight.detach())
    assert torch.equal(*weights)


def test_trains_with_an_optimizer(trained):
    run, untrained, losses = trained("word2vec")
    assert untrained == {"contexts": 0.5}
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert run.accuracy()["contexts"] > 0.55


def test_sparse_gradients_train_alike(data):
    """SGD with sparse gradients is SGD with dense ones."""
    batch = tuple(data.train_pairs[:300].T)
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        method = Word2Vec(data.vocabulary.counts, dim=16, sparse=sparse)
        optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            method(batch)[0].backward()
            optimizer.step()
        weights.append(method.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name])


def test_resumes_bit_for_bit(training):
    whole = training("word2vec")
    whole.run(3)
    state = copy.deepcopy(whole.state())
    losses = whole.run(3)
    again = training("word2vec", seed=1)
    again.load(state)
    assert again.run(3) == losses


def test_refuses():
    with pytest.raises(ValueError, match="dim must be at least 1"):
        Word2Vec(torch.ones(3), dim=0)
    with pytest.raises(ValueError, match="sample must be in"):
        Word2Vec(torch.ones(3), sample=-1.0)
    with pytest.raises(ValueError, match="weights must be finite"):
        Word2Vec(torch.tensor([1.0, -1.0]))
    method = Word2Vec(torch.ones(3), dim=2)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 3\), got 3"):
        method.fit([[0, 3]])
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        method.fit([[0, 1]], epochs=0)
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\]"):
        method.most_similar(torch.tensor([0]), k=3)


def test_the_example_of_the_docs():
    page = Path(__file__).parents[2] / "docs" / "tokens.md"
    (code,) = re.findall(r"```python\n(from sslkernels import text\n.*?)```", page.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("epochs=5", "epochs=1"), names)
    assert names["ids"].shape == (1, 5) and names["cosines"].isfinite().all()
