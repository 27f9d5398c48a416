# SPDX-License-Identifier: Apache-2.0
"""Small real corpora that an installed package ships (nothing is downloaded): words, word pieces, sentence pairs."""

from __future__ import annotations

import collections
import functools
import importlib.util
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CLS",
    "MASK",
    "PAD",
    "SEP",
    "SPECIAL_TOKENS",
    "UNK",
    "SentencePairs",
    "TextData",
    "Vocabulary",
    "encode",
    "head500",
    "lee_background",
    "passages",
    "sentence_pairs",
    "split",
    "train_tokenizer",
    "words",
]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)  # their ids in every tokenizer of `train_tokenizer`

# Where a sentence ends: behind its stop, perhaps quoted, and ahead of a capital; not behind "J." or "Mr."
_STOP = re.compile(r"""(?<!\b[A-Z]\.)(?<!\b[MD]r\.)(?<!\bMs\.)(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["']?[A-Z])""")

HEAD500_LINE = 20


def corpus(name: str) -> Path:
    """A file of gensim's own test data; gensim itself is not imported."""
    package = importlib.util.find_spec("gensim")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the corpora are gensim's: pip install -r requirements-demo.txt")
    return Path(package.submodule_search_locations[0], "test", "test_data", name)


@functools.cache
def lee_background() -> tuple[tuple[str, ...], ...]:
    """300 news articles of the Australian Broadcasting Corporation, 60,000 words: documents of sentences.

    Source: M. D. Lee, B. M. Pincombe, M. B. Welsh 2005, the background corpus of their document similarities.
    """
    articles = corpus("lee_background.cor").read_text(encoding="ascii").splitlines()
    return tuple(tuple(_STOP.split(article.strip())) for article in dict.fromkeys(articles))


@functools.cache
def head500() -> tuple[tuple[str, ...], ...]:
    """250 articles of Wikipedia, 331,000 words: documents of lines of `HEAD500_LINE` words, the last one shorter.

    The file holds stems in lower case without stop words, "anarch greek rule stem archon ruler", and no sign of where a
    sentence ends.
    """
    articles = [a.split() for a in corpus("head500.noblanks.cor").read_text(encoding="utf-8").splitlines()]
    starts = [range(0, len(article), HEAD500_LINE) for article in articles]
    return tuple(
        tuple(" ".join(article[i : i + HEAD500_LINE]) for i in lines) for article, lines in zip(articles, starts)
    )


def words(sentence: str) -> list[str]:
    """Lower-case runs of letters, hyphens and apostrophes inside them included: what word vectors are trained on."""
    return re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", sentence.lower())


class Vocabulary:
    """The words that occur at least `min_count` times, the most frequent first; equal ones in alphabetical order.

    Example:
        >>> vocabulary = Vocabulary([["a", "rose", "is", "a", "rose"]], min_count=2)
        >>> vocabulary.words, vocabulary.counts, vocabulary.encode(["is", "rose"])
        (('a', 'rose'), tensor([2, 2]), tensor([1]))
    """

    def __init__(self, sentences: Iterable[Sequence[str]], *, min_count: int = 5) -> None:
        counts = collections.Counter(word for sentence in sentences for word in sentence)
        kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        if not kept:
            raise ValueError(f"no word occurs {min_count} times")
        self.words = tuple(word for _, word in kept)
        self.counts = torch.tensor([-count for count, _ in kept])
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.index

    def encode(self, sentence: Sequence[str]) -> Tensor:
        """Ids (L,), int64, of the words that the vocabulary has; the others are left out, as word2vec does."""
        return torch.tensor([self.index[word] for word in sentence if word in self.index], dtype=torch.int64)


class TextData(NamedTuple):
    """Passages as token ids (N, L), and which document each is from (N,), int64, of two disjoint parts."""

    train_tokens: Tensor
    train_labels: Tensor
    test_tokens: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]  # the documents' first words
    tokenizer: Any


class SentencePairs(NamedTuple):
    """[CLS] A [SEP] B [SEP], padded: token ids and segments (N, L), and whether B is a random passage (N,), int64."""

    tokens: Tensor
    segments: Tensor  # 0 for A and what is around it and for padding, 1 for B and its [SEP]
    is_random: Tensor


def train_tokenizer(sentences: Iterable[str], *, vocab_size: int = 2048) -> Any:
    """A WordPiece `tokenizers.Tokenizer` in lower case as BERT's; pieces inside a word begin with "##".

    `encode(tokenizer, documents)` gives ids; those of `SPECIAL_TOKENS` are 0 to 4. The same one at every call.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the tokenizer is missing: pip install -r requirements-demo.txt") from error

    def new(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    sentences = list(sentences)
    trained = new(models.WordPiece(unk_token="[UNK]"))
    # Ids break ties. Those of pieces of one letter would follow a hash table, were they not among the first.
    letters = sorted({letter for s in sentences for letter in trained.normalizer.normalize_str(s) if letter != " "})
    first = [*SPECIAL_TOKENS, *(f"##{letter}" for letter in letters)]
    if vocab_size < len(first) + len(letters):
        raise ValueError(f"vocab_size must be at least {len(first) + len(letters)}, got {vocab_size}")
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    trained.train_from_iterator(sentences, trainer)
    return new(models.WordPiece(vocab=trained.get_vocab(), unk_token="[UNK]"))


def encode(tokenizer: Any, documents: Iterable[Sequence[str]]) -> list[list[list[int]]]:
    """Documents of sentences of ids."""
    return [[tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in d] for d in documents]


def split(documents: Iterable[Sequence[str]], share: float = 0.6) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """The sentences in the first `share` of each document's letters, and the other ones."""
    first, last = [], []
    for document in documents:
        ends = list(itertools.accumulate(len(sentence) for sentence in document))
        cut = sum(end <= share * ends[-1] for end in ends)
        first.append(document[:cut])
        last.append(document[cut:])
    return first, last


def passages(
    documents: Iterable[Sequence[str]], *, length: int = 32, vocab_size: int = 2048, train_share: float = 0.6
) -> TextData:
    """Passages [CLS] ... [SEP] of `length` tokens, without gaps or overlaps; the class of one is its document.

    Training passages come from the first sentences of a document, held-out ones from the last: they share none. The
    tokenizer is trained on the first ones alone. Documents too short for a passage on either side are left out.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3, got {length}")
    parts = split(documents, train_share)
    tokenizer = train_tokenizer((sentence for document in parts[0] for sentence in document), vocab_size=vocab_size)
    windows = [[_windows(document, length) for document in encode(tokenizer, part)] for part in parts]
    tensors, classes = ([], [], [], []), []  # type: tuple[list[Tensor], ...], list[str]
    for document, *both in zip(parts[0], *windows):
        if not all(both):
            continue
        for i, rows in enumerate(both):
            tensors[2 * i].append(torch.tensor(rows))
            tensors[2 * i + 1].append(torch.full((len(rows),), len(classes)))
        classes.append(" ".join(document[0].split()[:5]))
    if not classes:
        raise ValueError(f"no document has {length} tokens on either side")
    train, train_labels, test, test_labels = (torch.cat(part) for part in tensors)
    return TextData(train, train_labels, test, test_labels, tuple(classes), tokenizer)


def _windows(document: list[list[int]], length: int) -> list[list[int]]:
    ids, step = _joined(document), length - 2
    return [[CLS, *ids[start : start + step], SEP] for start in range(0, len(ids) - step + 1, step)]


def _joined(sentences: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(sentences))


def sentence_pairs(
    documents: Sequence[Sequence[Sequence[int]]],
    *,
    length: int = 128,
    random_next: float = 0.5,
    short: float = 0.1,
    generator: torch.Generator | None = None,
) -> SentencePairs:
    """One pass over documents of sentences of ids, in pairs for the prediction of the next sentence, as BERT's.

    Sentences are collected to length - 3 tokens, in a tenth of the documents (`short`) to a random number of fewer.
    Their first ones, a random number, are A. B are the others; or, half of the times (`random_next`) and where there is
    one sentence only, sentences from a random place of another document, and the others come again. What is too long
    loses tokens from either end of the longer side.

    Source: google-research/bert `create_pretraining_data.py::create_instances_from_document`, which draws B from the
    same document if ten draws hit nothing else.
    """
    if length < 5:
        raise ValueError(f"length must be at least 5, got {length}")
    texts = [[list(sentence) for sentence in document if len(sentence)] for document in documents]
    texts = [document for document in texts if document]
    if len(texts) < 2:
        raise ValueError(f"documents must be at least two with tokens, got {len(texts)}")
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    rows: list[tuple[list[int], list[int], bool]] = []
    for number, document in enumerate(texts):
        place = 0
        most = length - 3 if draw.random() >= short else draw.randint(2, length - 3)
        while place < len(document):
            chunk = _collect(document, place, most)
            size = draw.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            a, b = chunk[:size], chunk[size:]
            is_random = not b or draw.random() < random_next
            if is_random:
                place += size
                other = texts[(number + draw.randint(1, len(texts) - 1)) % len(texts)]
                b = _collect(other, draw.randrange(len(other)), most - sum(map(len, a)))
            else:
                place += len(chunk)
            rows.append((*_truncate(_joined(a), _joined(b), length - 3, draw), is_random))
    tokens = torch.full((len(rows), length), PAD)
    segments = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, (first, second, _) in enumerate(rows):
        row = [CLS, *first, SEP, *second, SEP]
        tokens[i, : len(row)] = torch.tensor(row)
        segments[i, len(first) + 2 : len(row)] = 1
    return SentencePairs(tokens, segments, torch.tensor([is_random for _, _, is_random in rows]).long())


def _collect(document: list[list[int]], place: int, tokens: int) -> list[list[int]]:
    """Sentences from `place` on until they have so many tokens, one at the least."""
    end, total = place, 0
    while end < len(document) and (total < tokens or end == place):
        total += len(document[end])
        end += 1
    return document[place:end]


def _truncate(a: list[int], b: list[int], most: int, draw: random.Random) -> tuple[list[int], list[int]]:
    while len(a) + len(b) > most:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if draw.random() < 0.5 else -1)
    return a, b
