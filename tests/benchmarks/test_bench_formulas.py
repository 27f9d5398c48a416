# SPDX-License-Identifier: Apache-2.0
"""What judges a random result must see a wrong one: each restated original passes, and a change of it does not."""

import random

import numpy as np
import pytest
import torch

from benchmarks import overflow
from benchmarks.cases import find
from benchmarks.formulas import ema, neighbors, tokens


def swapped(ids):
    """The two parts exchange their last token, so that both keep their count."""
    first, second = (part.clone() for part in ids)
    second[..., -1] = first[..., -1]
    return first, second


def holes(mask):
    return mask & (torch.rand(mask.shape) > 0.05)


def stretched(result):
    context, targets = result
    return context, torch.cat([targets, targets[..., -1:] + 1], -1)


def towards_the_start(ids):
    count = ids[0].shape[1]
    every = torch.arange(count + ids[1].shape[1]).expand(len(ids[0]), -1)
    return every[:, :count], every[:, count:]


def other_label(result):
    inputs, labels = result
    return inputs, torch.where(labels == -100, labels, labels + 1)


def never_random(result):
    inputs, labels = result
    return torch.where(labels == -100, inputs, 103), labels


def another_token(result):
    inputs, targets = (part.clone() for part in result)
    targets[0, 1] += 1
    return inputs, targets


WRONG = [
    ("random_mask", "mae", swapped),
    ("random_mask", "mae", towards_the_start),
    ("tube_mask", "videomae", swapped),
    ("block_mask-16", "dinov2", lambda mask: mask[:, torch.randperm(256)]),
    ("block_mask-16", "dinov2", torch.ones_like),
    ("multiblock_mask", "ijepa", stretched),
    ("multiblock_mask", "ijepa", lambda result: (result[1][:, 0], result[1])),
    ("inverse_block_mask", "data2vec", swapped),
    ("inverse_block_mask", "data2vec", lambda ids: tuple(torch.rand(len(ids[0]), 196).argsort(1).split([39, 157], 1))),
    ("span_mask", "transformers", holes),
    ("span_mask", "transformers", torch.ones_like),
    ("token_mask", "transformers", other_label),
    ("token_mask", "transformers", never_random),
    ("span_corruption", "transformers", another_token),
    ("span_corruption", "transformers", lambda result: (result[0].flip(1), result[1])),
]


@pytest.mark.parametrize(("name", "peer", "change"), WRONG)
def test_a_wrong_mask_is_seen(name, peer, change):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    case = find(name)
    contender, inputs = case.contender(peer), case.make_inputs()
    result = contender.result(contender.call(**contender.prepare(dict(inputs))))
    assert case.holds(result, **inputs) is None
    assert case.holds(change(result), **inputs)


@pytest.mark.parametrize(
    "update",
    [
        lambda t, s, m: t.lerp_(s, 1 - m),
        lambda t, s, m: t.float().lerp_(s.float(), 1 - m),
        lambda t, s, m: t.add_(0.02),
    ],
    ids=["to nearest", "float32", "elsewhere"],
)
def test_an_average_that_is_not_rounded_at_random_is_seen(update):
    case = find("ema_update-bfloat16").tiny()
    inputs = case.make_inputs()
    targets = [t.clone() for t in inputs["targets"]]
    result = [update(t, s, inputs["momentum"]) for t, s in zip(targets, inputs["sources"], strict=True)]
    assert ema.rounded_at_random(result, **inputs)


def top_of_three(metric):
    queries, keys = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).split([1, 3])
    scores = queries @ keys.T if metric == "dot" else -torch.cdist(queries, keys).square()
    values, indices = scores.sort(descending=True)
    return queries, keys, values.abs() if metric == "l2" else values, indices


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_wrong_neighbours_are_seen(metric):
    queries, keys, values, indices = top_of_three(metric)
    judge = {"queries": queries, "keys": keys, "k": 2, "metric": metric}
    assert neighbors.top((values[:, :2], indices[:, :2]), **judge) is None
    assert "worse" in neighbors.top((values[:, 1:], indices[:, 1:]), **judge)
    assert "first" in neighbors.top((values[:, :2].flip(1), indices[:, :2].flip(1)), **judge)
    assert "off by" in neighbors.top((values[:, :2] * 1.01, indices[:, :2]), **judge)
    assert "twice" in neighbors.top((values[:, [0, 0]], indices[:, [0, 0]]), **judge)
    assert "outside" in neighbors.top((values[:, :2], indices[:, :2] + 3), **judge)
    assert "expected" in neighbors.top((values, indices), **judge)


def test_a_wrong_nearest_key_is_seen():
    queries, keys, _, indices = top_of_three("l2")
    judge = {"queries": queries, "keys": keys}
    assert neighbors.nearest(indices[:, 0], **judge) is None
    assert "farther" in neighbors.nearest(indices[:, 1], **judge)
    assert "outside" in neighbors.nearest(indices[:, 0] + 3, **judge)
    assert "expected" in neighbors.nearest(indices, **judge)


def test_word_vectors_that_learned_nothing_are_seen():
    case = find("skipgram_update").tiny()
    inputs = case.make_inputs()
    start = inputs["input_weight"], inputs["output_weight"]
    assert tokens.vectors(start, **inputs) == "the loss is 4.1589, not below 4.1589"
    trained = case.step("sslkernels", inputs).forward()
    assert tokens.vectors(trained, **inputs) is None
    assert tokens.vectors((trained[0], -trained[1]), **inputs)
    assert "finite" in tokens.vectors((trained[0] * torch.nan, trained[1]), **inputs)


def test_where_the_originals_overflow_ours_is_exact():
    found = overflow.errors()
    at = {largest: {name: row[i] for name, row in found.items()} for i, largest in enumerate(overflow.LARGEST)}
    assert all(at[3.5][name] < 1e-5 for name in ("DINOv2, SwAV", "lightly"))
    assert all(at[3.6][name] != at[3.6][name] for name in ("DINOv2, SwAV", "lightly"))  # NaN
    assert at[1.0]["DINOv2, the maximum of each row subtracted"] > 0.1  # finite, and other codes
    for largest in overflow.LARGEST:
        assert at[largest]["sinkhorn_knopp"] <= max(1e-5, 4 * 2.0**-23 * largest / overflow.TEMPERATURE)
    assert overflow.table(found).count("NaN") >= 6


def test_where_the_originals_koleo_is_infinite_ours_is_that_of_float32():
    for rows in ("two equal rows", "two rows of zeros"):
        assert "nan" in overflow.told(overflow.KOLEO["lightly"], rows, torch.float16)
        ours = [overflow.told(overflow.KOLEO["koleo_loss"], rows, t) for t in (torch.float16, torch.float32)]
        assert ours[0] == ours[1] and "nan" not in ours[0]
    assert overflow.koleo_table().count("nan") >= 6
