# SPDX-License-Identifier: Apache-2.0
"""Classification by the names of the classes: images find the nearest of the classes' prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.evaluation._labelled import Batches, batches
from sslkernels.ops import l2_normalize, topk_similarity
from sslkernels.reference._precision import compute_dtype


def fill_templates(classnames: Sequence[str], templates: Sequence[str | Callable[[str], str]]) -> list[list[str]]:
    """Prompts for each class: each template, with "{}" for the name or a function of it, filled with its name.

    Example:
        >>> fill_templates(["cat", "dog"], ["a photo of a {}.", lambda name: f"{name}s"])
        [['a photo of a cat.', 'cats'], ['a photo of a dog.', 'dogs']]
    """
    for name, x in (("classnames", classnames), ("templates", templates)):
        if isinstance(x, str):
            raise TypeError(f"{name} must be a sequence of texts, got the one text {x!r}")
        if not x:
            raise ValueError(f"{name} must not be empty")
    return [[t.format(name) if isinstance(t, str) else t(name) for t in templates] for name in classnames]


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[Any], Tensor],
    prompts: Sequence[Sequence[str] | Tensor],
    *,
    tokenizer: Callable[[list[str]], Any] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """The unit vector of each class, from an ensemble of prompts.

        w_c = unit(mean over the prompts p of class c of unit(encode_text(p)))

    Both normalizations count: without the inner one a long embedding outvotes the others of its class, without the
    outer one classes whose prompts disagree score less.

    Source: Radford et al. 2021, 3.1.4; open_clip `zero_shot_classifier.py::build_zero_shot_classifier`, which returns
    the transpose.

    Args:
        encode_text: tokens (B, ...), or a list of B texts where there is no tokenizer, to embeddings (B, D); called on
            the prompts of several classes at once. Evaluation mode is the caller's business.
        prompts: for each class its texts (`fill_templates`) or its token ids (P, ...); classes may differ in P.
        tokenizer: of texts, to what `encode_text` takes.
        batch_size: prompts per call.

    Returns:
        (C, D), float32 (float64 for float64 embeddings).

    Raises:
        ValueError: no class, or a class without a prompt.
        TypeError: embeddings that are not a floating tensor; a class whose prompts are one text.

    Example:
        >>> encoder = torch.nn.EmbeddingBag(100, 16)
        >>> zero_shot_classifier(encoder, [torch.randint(100, (7, 5)), torch.randint(100, (3, 5))]).shape
        torch.Size([2, 16])
    """
    check.integer("batch_size", batch_size, 1)
    if not len(prompts):
        raise ValueError("prompts must hold at least one class, got none")
    for c, own in enumerate(prompts):
        if isinstance(own, str):
            raise TypeError(f"prompts[{c}] must be several texts or a tensor of tokens, got the one text {own!r}")
        if not len(own):
            raise ValueError(f"prompts[{c}] must not be empty")
    counts = torch.tensor([len(own) for own in prompts])
    units = torch.cat([_embeddings(encode_text(some)) for some in _calls(prompts, tokenizer, batch_size)])
    of_class = torch.arange(len(prompts)).repeat_interleave(counts).to(units.device)
    # the sum does for the mean, as it is made unit anyway
    return l2_normalize(units.new_zeros(len(prompts), units.shape[1]).index_add_(0, of_class, units))


def _calls(prompts: Sequence[Any], tokenizer: Callable[[list[str]], Any] | None, batch_size: int) -> Sequence[Any]:
    if all(isinstance(own, Tensor) for own in prompts):
        return torch.cat(list(prompts)).split(batch_size)
    texts = [text for own in prompts for text in own]
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return [tokenizer(part) for part in parts] if tokenizer else parts


def _embeddings(x: Tensor) -> Tensor:
    check.features(**{"encode_text's embeddings": x})
    return _unit(x)


def _unit(x: Tensor) -> Tensor:
    return l2_normalize(x.to(compute_dtype(x)))


@torch.no_grad()
def zero_shot_accuracy(
    image_features: Tensor | Batches,
    labels: Tensor | None,
    classifier: Tensor,
    *,
    topk: Sequence[int] = (1, 5),
    chunk_size: int = 4096,
) -> dict[int, float]:
    """For each t of `topk` the share of images whose class is among the t with the largest <image, w_c>.

    Args:
        image_features: (N, D), normalized or not; or an iterable of (features, labels), `labels` None.
        labels: (N,) int64 class numbers.
        classifier: (C, D), from `zero_shot_classifier`.
        topk: numbers of classes; beyond C all are meant. Ties go to the smaller class.
        chunk_size: images at a time.

    Raises:
        ValueError, TypeError: features, labels or classifier of another shape, dtype or device; a label that is no row
            of the classifier; no image; a t below 1.

    Example:
        >>> zero_shot_accuracy(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]), torch.eye(3), topk=(1, 3))
        {1: 0.6666666666666666, 3: 1.0}
    """
    for t in topk:
        check.integer("topk", t, 1)
    right = dict.fromkeys(topk, 0)
    total = 0
    for features, truth in batches(image_features, labels, chunk_size):
        check.features(image_features=features, classifier=classifier)
        if len(truth) and int(truth.max()) >= len(classifier):
            raise ValueError(f"labels must be below the {len(classifier)} classes, got {int(truth.max())}")
        best = min(max(topk), len(classifier))
        score, index = topk_similarity(_unit(features), classifier, best, metric="dot")
        found = (index == truth[:, None]) & ~score.isnan()
        for t in topk:
            right[t] += int(found[:, :t].sum())
        total += len(truth)
    if not total:
        raise ValueError("image_features must not be empty, got no image to classify")
    return {t: count / total for t, count in right.items()}
