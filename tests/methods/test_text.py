# SPDX-License-Identifier: Apache-2.0
"""The corpora, and what is made of them."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from sslkernels import text


@pytest.fixture(scope="module")
def news() -> text.TextData:
    return text.passages(text.lee_background())


def test_corpora():
    lee, head = text.lee_background(), text.head500()
    assert len(lee) == len(set(lee)) == 293  # of the file's 300, which repeats some
    assert sum(len(text.words(s)) for d in lee for s in d) == pytest.approx(60_000, rel=0.05)
    assert len(head) == 250 and sum(len(s.split()) for d in head for s in d) == 331_339
    assert all(len(s.split()) == text.HEAD500_LINE for d in head for s in d[:-1])
    assert lee[3][0].endswith("office just a week ago.") and lee[3][1].startswith("Aldolfo Rodregiuez Saa told")
    lengths = sorted(len(s.split()) for d in lee for s in d)
    assert 15 < lengths[len(lengths) // 2] < 30


def test_sentences_end_at_stops_alone():
    article = 'Mr. Bush met J. Howard. "It is 4.30 now." He left at 5 p.m. today! "Why?" asked Dr. No.'
    assert text._STOP.split(article) == [
        "Mr. Bush met J. Howard.", '"It is 4.30 now."', "He left at 5 p.m. today!", '"Why?" asked Dr. No.'
    ]  # fmt: skip


def test_words():
    assert text.words("It's 4:00pm in the South-West; Musé's 'own' 3rd.") == [
        "it's", "pm", "in", "the", "south-west", "musé's", "own", "rd"
    ]  # fmt: skip


def test_vocabulary():
    vocabulary = text.Vocabulary([["b", "a", "c", "b"], ["a", "d", "a"]], min_count=2)
    assert vocabulary.words == ("a", "b") and vocabulary.counts.tolist() == [3, 2] and len(vocabulary) == 2
    assert "a" in vocabulary and "c" not in vocabulary
    assert vocabulary.encode(["c", "b", "a"]).tolist() == [1, 0]
    assert vocabulary.encode(["c"]).dtype == torch.int64
    with pytest.raises(ValueError, match="no word occurs 4 times"):
        text.Vocabulary([["a"]], min_count=4)


def test_passages_hold_out_the_ends_of_documents(news):
    for tokens, labels in (news[:2], news[2:4]):
        assert tokens.shape == (len(labels), 32) and tokens.dtype == labels.dtype == torch.int64
        assert (tokens[:, 0] == text.CLS).all() and (tokens[:, -1] == text.SEP).all()
        assert not torch.isin(tokens[:, 1:-1], torch.tensor([text.PAD, text.CLS, text.SEP, text.MASK])).any()
        assert labels.unique().tolist() == list(range(len(news.classes)))
    # the training part knows all of its letters, so none of it is unknown
    assert not (news.train_tokens == text.UNK).any()
    assert (news.train_tokens.max(), news.tokenizer.get_vocab_size()) == (2047, 2048)


def test_passages_follow_the_document(news):
    first, last = text.split(text.lee_background())
    assert all(a + b == whole for a, b, whole in zip(first, last, text.lee_background(), strict=True))
    share = sum(len(s) for d in first for s in d) / sum(len(s) for d in text.lee_background() for s in d)
    assert 0.5 < share < 0.6
    ids = [i for sentence in text.encode(news.tokenizer, first[:1])[0] for i in sentence]
    of_first = news.train_tokens[news.train_labels == 0][:, 1:-1].flatten().tolist()
    assert of_first == ids[: len(of_first)] and len(ids) - len(of_first) < 30
    decoded = news.tokenizer.decode(news.train_tokens[0].tolist(), skip_special_tokens=False)
    assert decoded.startswith("[CLS] hundreds of people have been forced to")


def test_tokenizer_is_the_same_in_every_process():
    """Its trainer breaks ties by ids, some of which follow a hash table of its own in every process."""
    code = (
        "from sslkernels import text; import hashlib;"
        "t = text.train_tokenizer((s for d in text.lee_background()[:60] for s in d), vocab_size=500);"
        "print(hashlib.sha256(t.to_str().encode()).hexdigest())"
    )
    here = text.train_tokenizer((s for d in text.lee_background()[:60] for s in d), vocab_size=500)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here.to_str().encode()).hexdigest()
    vocabulary = here.get_vocab()
    assert [vocabulary[token] for token in text.SPECIAL_TOKENS] == [0, 1, 2, 3, 4] and len(vocabulary) == 500


def test_sentence_pairs(news):
    documents = text.encode(news.tokenizer, text.split(text.lee_background())[0])
    pairs = text.sentence_pairs(documents, length=64, generator=torch.Generator().manual_seed(0))
    again = text.sentence_pairs(documents, length=64, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(pairs, again))
    tokens, segments, is_random = pairs
    assert tokens.shape == segments.shape == (len(is_random), 64)
    assert (tokens[:, 0] == text.CLS).all() and ((tokens == text.SEP).sum(dim=1) == 2).all()
    lengths = (tokens != text.PAD).sum(dim=1)
    for row, segment, size in zip(tokens, segments, lengths.tolist()):
        first = (row == text.SEP).nonzero()[0].item()
        assert row[size - 1] == text.SEP and (row[size:] == text.PAD).all() and 1 < first < size - 2
        assert segment.tolist() == [0] * (first + 1) + [1] * (size - first - 1) + [0] * (64 - size)
    # half at random, and those with one sentence only; a tenth of the documents in shorter pairs
    assert 0.5 < is_random.float().mean() < 0.75 and (lengths >= 62).float().mean() > 0.6


def test_next_sentences_are_next():
    """Every token tells its document and its place in it, and no pair is cut."""
    documents = [[[100 * d + 10 + 3 * s + i for i in range(3)] for s in range(8)] for d in range(5)]
    generator = torch.Generator().manual_seed(1)
    seen = torch.zeros(2)
    for _ in range(40):
        tokens, segments, is_random = text.sentence_pairs(documents, length=18, short=0.0, generator=generator)
        for row, segment, random in zip(tokens, segments, is_random):
            content = row >= 10
            a, b = row[content & (segment == 0)], row[content & (segment == 1)]
            assert all((side.diff() == 1).all() for side in (a, b))
            assert (a[0] // 100 == b[0] // 100) == (not random)
            assert random or b[0] == a[-1] + 1
            seen[int(random)] += 1
        firsts = {int(i) for i in tokens[tokens >= 10] if i // 100 == 0}
        assert firsts == {10 + i for i in range(24)}  # whatever the draws, every sentence comes
    assert 0.45 < seen[1] / seen.sum() < 0.75


def test_refuses(monkeypatch):
    with pytest.raises(ValueError, match="length must be at least 5, got 4"):
        text.sentence_pairs([[[1]], [[2]]], length=4)
    with pytest.raises(ValueError, match="two with tokens, got 1"):
        text.sentence_pairs([[[1]], [[]]])
    with pytest.raises(ValueError, match="length must be at least 3, got 2"):
        text.passages([], length=2)
    with pytest.raises(ValueError, match="no document has 900 tokens"):
        text.passages(text.lee_background()[:40], length=900, vocab_size=500)
    with pytest.raises(ValueError, match="vocab_size must be at least 15, got 7"):
        text.train_tokenizer(["a rose"], vocab_size=7)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"requirements-demo\.txt"):
        text.corpus("lee.cor")
