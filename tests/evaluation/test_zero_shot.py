# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkernels.evaluation import fill_templates, zero_shot_accuracy, zero_shot_classifier

COUNTS = (1, 5, 3)  # prompts of each class


@pytest.fixture
def encoder() -> nn.Module:
    """Embeddings of very different lengths, so that what is normalised shows."""
    encoder = nn.EmbeddingBag(50, 12)
    with torch.no_grad():
        encoder.weight.mul_(torch.logspace(-3, 3, 50)[:, None])
    return encoder


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    return [torch.randint(50, (count, 4)) for count in COUNTS]


def formula(encoder, prompts, inner=True):
    """Class by class; `inner` is the normalization that a plain average leaves out."""
    rows = []
    for own in prompts:
        embeddings = encoder(own).detach().double()
        if inner:
            embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
        mean = embeddings.mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_is_the_unit_mean_of_unit_embeddings(encoder, prompts):
    classifier = zero_shot_classifier(encoder, prompts)
    assert classifier.shape == (3, 12) and classifier.dtype == torch.float32 and not classifier.requires_grad
    torch.testing.assert_close(classifier.double(), formula(encoder, prompts), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(classifier.double(), formula(encoder, prompts, inner=False), atol=0.1)
    torch.testing.assert_close(
        zero_shot_classifier(encoder.double(), prompts), formula(encoder, prompts), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("batch_size", [1, 2, 8, 9, 100])
def test_batches_of_prompts_do_not_matter(encoder, prompts, batch_size):
    sizes = []

    def encode(tokens):
        sizes.append(len(tokens))
        return encoder(tokens)

    classifier = zero_shot_classifier(encode, prompts, batch_size=batch_size)
    assert max(sizes) <= batch_size and sum(sizes) == sum(COUNTS)
    torch.testing.assert_close(classifier, zero_shot_classifier(encoder, prompts), rtol=1e-5, atol=1e-6)


def test_texts_are_tokenized():
    seen = []

    def tokenizer(texts):
        seen.extend(texts)
        return torch.tensor([[len(text)] for text in texts])

    encoder = nn.EmbeddingBag(50, 8)
    prompts = fill_templates(["cat", "horse"], ["a {}.", "the {} there", str.upper])
    assert prompts == [["a cat.", "the cat there", "CAT"], ["a horse.", "the horse there", "HORSE"]]
    tokens = [torch.tensor([[len(text)] for text in own]) for own in prompts]
    expected = zero_shot_classifier(encoder, tokens)
    torch.testing.assert_close(zero_shot_classifier(encoder, prompts, tokenizer=tokenizer, batch_size=4), expected)
    assert seen == [text for own in prompts for text in own]
    without = zero_shot_classifier(lambda texts: encoder(tokenizer(texts)), prompts)
    torch.testing.assert_close(without, expected)


def test_accuracy_counts_by_cosine():
    torch.manual_seed(0)
    images, classifier = torch.randn(97, 10), F.normalize(torch.randn(7, 10), dim=1)
    images *= torch.logspace(-3, 3, 97)[:, None]
    labels = torch.randint(7, (97,))
    order = (F.normalize(images.double(), dim=1) @ classifier.double().T).argsort(dim=1, descending=True)
    expected = {t: float((order[:, :t] == labels[:, None]).any(dim=1).double().mean()) for t in (1, 3, 5)}
    assert zero_shot_accuracy(images, labels, classifier, topk=(1, 3, 5)) == expected
    assert zero_shot_accuracy(images, labels, classifier, topk=(1, 3, 5), chunk_size=10) == expected
    pairs = ((images[i : i + 13], labels[i : i + 13]) for i in range(0, 97, 13))
    assert zero_shot_accuracy(pairs, None, classifier, topk=(1, 3, 5)) == expected
    assert zero_shot_accuracy(images, labels, classifier, topk=(7, 20)) == {7: 1.0, 20: 1.0}


def test_features_that_are_not_numbers_are_never_right():
    images = torch.eye(3)
    images[0] = float("nan")
    assert zero_shot_accuracy(images, torch.arange(3), torch.eye(3), topk=(1, 3)) == {1: 2 / 3, 3: 2 / 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_takes_other_floats(dtype):
    images, labels = torch.randn(40, 16), torch.randint(5, (40,))
    classifier = torch.randn(5, 16)
    order = F.normalize(images.to(dtype).double(), dim=1) @ classifier.to(dtype).double().T
    share = float((order.argmax(dim=1) == labels).double().mean())
    assert zero_shot_accuracy(images.to(dtype), labels, classifier.to(dtype))[1] == share


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda e: zero_shot_classifier(e, []), ValueError, "prompts must hold at least one class"),
        (lambda e: zero_shot_classifier(e, [torch.ones(0, 2)]), ValueError, r"prompts\[0\] must not be empty"),
        (lambda e: zero_shot_classifier(e, ["a cat"]), TypeError, r"prompts\[0\].*'a cat'"),
        (lambda e: zero_shot_classifier(e, [torch.ones(2, 2).long()], batch_size=0), ValueError, "batch_size"),
        (lambda e: zero_shot_classifier(lambda x: x, [torch.ones(2, 2).long()]), TypeError, "encode_text's embeddings"),
        (lambda e: fill_templates("cat", ["{}"]), TypeError, "classnames must be a sequence"),
        (lambda e: fill_templates(["cat"], []), ValueError, "templates must not be empty"),
        (lambda e: zero_shot_accuracy(torch.ones(2, 3), None, torch.eye(3)), TypeError, "labels"),
        (lambda e: zero_shot_accuracy([], None, torch.eye(3)), ValueError, "image_features must not be empty"),
        (
            lambda e: zero_shot_accuracy(torch.ones(2, 3), torch.tensor([0, 3]), torch.eye(3)),
            ValueError,
            "labels must be below the 3 classes, got 3",
        ),
        (
            lambda e: zero_shot_accuracy(torch.ones(2, 3), torch.tensor([0, -1]), torch.eye(3)),
            ValueError,
            "labels must be class numbers from 0, got -1",
        ),
        (lambda e: zero_shot_accuracy(torch.ones(2, 3), torch.zeros(2), torch.eye(3)), TypeError, "labels"),
        (
            lambda e: zero_shot_accuracy(torch.ones(2, 4), torch.zeros(2).long(), torch.eye(3)),
            ValueError,
            "classifier must have as many features",
        ),
        (
            lambda e: zero_shot_accuracy(torch.ones(2, 3), torch.zeros(2).long(), torch.eye(3), topk=(0,)),
            ValueError,
            "topk",
        ),
    ],
)
def test_refuses(encoder, call, error, match):
    with pytest.raises(error, match=match):
        call(encoder)
