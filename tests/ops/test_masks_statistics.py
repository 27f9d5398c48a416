# SPDX-License-Identifier: Apache-2.0
"""What the masks promise on average: uniform positions, the counts and areas of the originals, their coverage."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import masks_originals as originals
import numpy as np
import pytest
import torch
from masks_cases import (
    assert_same_distribution,
    assert_uniform,
    assert_uniform_subsets,
    chi_square_limit,
    one_hot,
    tokens,
)
from torch import Tensor

from sslkernels import ops
from sslkernels.ops._masks_span import _span_thresholds


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(1)


def union(targets: Tensor, length: int) -> Tensor:
    return one_hot(targets, length).any(1)


def runs(mask: Tensor) -> Tensor:
    """Lengths of the runs of True in (N, L)."""
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)
    return (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]


class TestRandom:
    def test_every_position_is_kept_equally_often(self) -> None:
        visible, _ = ops.random_mask(20_000, 196, 0.75, seed=1)
        assert_uniform_subsets(one_hot(visible, 196))

    def test_every_set_is_equally_likely(self) -> None:
        visible, _ = ops.random_mask(40_000, 6, 0.5, seed=1)
        counts = Counter(map(tuple, visible.tolist()))
        assert_uniform(torch.tensor([counts[kept] for kept in itertools.combinations(range(6), 3)]))

    def test_samples_are_independent(self) -> None:
        kept = one_hot(ops.random_mask(20_000, 50, 0.6, seed=1)[0], 50)
        shared = (kept[1:] & kept[:-1]).sum(1).double()  # hypergeometric
        assert abs(float(shared.mean()) - 20 * 20 / 50) < 4 * float(shared.std()) / math.sqrt(20_000)

    def test_seeds_are_independent(self) -> None:
        kept = torch.stack([one_hot(ops.random_mask(1, 50, 0.6, seed=seed)[0], 50)[0] for seed in range(2000)])
        assert_uniform_subsets(kept)

    def test_tube(self) -> None:
        visible, masked = ops.tube_mask(8, 8, (14, 14), 0.9)
        assert (visible.shape, masked.shape) == ((8, 160), (8, 8 * 176))
        assert_uniform_subsets(one_hot(ops.tube_mask(20_000, 1, (7, 7), 0.5, seed=2)[0], 49))


class TestBlocks:
    def test_beit_counts(self) -> None:
        count = ops.block_mask(20_000, (14, 14), 75 / 196, style="beit", seed=1).flatten(1).sum(1)
        assert abs(float(count.double().mean()) - 74.5) < 0.3
        assert float((count >= 66).double().mean()) > 0.998  # the least that a simulation of the original saw
        assert int(count.max()) == 75

    def test_beit_is_the_original(self, random: np.random.Generator) -> None:
        ours = ops.block_mask(20_000, (14, 14), 75 / 196, style="beit", seed=1).flatten(1)
        assert_same_distribution(
            ours, originals.stacked([originals.block(random, 14, 14, 75, 16, 196) for _ in range(1500)])
        )

    def test_ibot_is_the_original(self, random: np.random.Generator) -> None:
        ours = ops.block_mask(20_000, (14, 14), (0.1, 0.5), style="ibot", probability=0.5, seed=2).flatten(1)
        assert abs(float(ours.any(1).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(20_000)
        theirs = [originals.block(random, 14, 14, random.uniform(0.1, 0.5) * 196, 16, 196) for _ in range(1500)]
        assert_same_distribution(ours[ours.any(1)], originals.stacked(theirs))

    @pytest.mark.parametrize("side", [16, 37])
    def test_dinov2_is_the_original(self, side: int, random: np.random.Generator) -> None:
        size = side * side
        ours = torch.cat([ops.block_mask(64, (side, side), (0.1, 0.5), probability=0.5, seed=s) for s in range(100)])
        theirs, slices = [], np.linspace(0.1, 0.5, 33)
        for i in range(1024):
            target = int(size * random.uniform(*slices[i % 32 : i % 32 + 2]))
            theirs.append(originals.block(random, side, side, target, 4, size // 2))
        ours = ours.flatten(1)
        assert_same_distribution(ours[ours.any(1)], originals.stacked(theirs))

    def test_dinov2_masks_an_exact_number_of_samples_with_spread_ratios_in_any_order(self) -> None:
        order = torch.zeros(64)
        for seed in range(200):
            count = ops.block_mask(64, (16, 16), (0.1, 0.5), probability=0.5, seed=seed).flatten(1).sum(1)
            masked = count[count > 0]
            assert len(masked) == 32
            edges = 256 * torch.linspace(0.1, 0.5, 33)  # a block may stop short, so most and not all are in their slice
            assert float((masked.sort().values - edges[:-1] > -3).double().mean()) > 0.9
            order += count > 0
        z = (order - 100) / math.sqrt(200 * 0.25)
        assert float((z**2).sum()) < chi_square_limit(63)

    def test_aspect_is_log_uniform(self) -> None:
        """Of samples that one block of fixed area fills."""
        options = {"min_patches": 400, "max_patches": 400, "aspect": (0.25, 4.0)}
        mask = ops.block_mask(4000, (64, 64), 400 / 4096, seed=1, **options)
        rows, cols = mask.any(2).sum(1).double(), mask.any(1).sum(1).double()
        whole = (mask.flatten(1).sum(1) == rows * cols) & (rows * cols > 350)
        assert float(whole.double().mean()) > 0.4
        log_aspect = (rows[whole] / cols[whole]).log() / math.log(4)
        assert abs(float(log_aspect.mean())) < 0.05
        assert abs(float(log_aspect.std()) - 1 / math.sqrt(3)) < 0.05

    def test_inverse_block_counts_and_coverage(self, random: np.random.Generator) -> None:
        visible, masked = ops.inverse_block_mask(20_000, (14, 14), seed=1)
        assert (visible.shape[1], masked.shape[1]) == (39, 157)
        theirs = originals.stacked([originals.data2vec_image(random) for _ in range(3000)])
        ours = one_hot(visible, 196)
        assert_same_distribution(ours, theirs)
        both = [float((x[:, :-1] & x[:, 1:]).sum(1).double().mean()) for x in (ours, theirs)]  # neighbours: blocks
        assert abs(both[0] - both[1]) < 0.3


class TestMultiblock:
    def test_sizes_of_ijepa(self) -> None:
        """The original's numbers on 16 x 16, from a simulation of it: 44 tokens a target, 45% together, 43% context."""
        whole, joined, tokens_of_target = [], [], []
        for seed in range(300):
            _, targets = ops.multiblock_mask(8, (16, 16), reproduce_bugs=True, seed=seed)
            tokens_of_target.append(targets.shape[2])
            joined.append(union(targets, 256).double().mean())
            random = np.random.default_rng(seed)
            whole.append(np.mean(originals.ijepa(random, 4, 16, 16, fixed=False)[0]))
        assert abs(np.mean(tokens_of_target) - 44) < 1
        assert abs(float(torch.stack(joined).mean()) - 0.45) < 0.01
        assert abs(np.mean(whole) - 0.43) < 0.01

    @pytest.mark.parametrize("fixed", [False, True], ids=["bugs", "fixed"])
    def test_is_the_original(self, fixed: bool, random: np.random.Generator) -> None:
        batches, ours, theirs = 400, [[], []], [[], []]
        for seed in range(batches):
            # of a batch of one nothing is cut
            context, targets = ops.multiblock_mask(1, (14, 14), reproduce_bugs=not fixed, seed=seed)
            ours[0].append(one_hot(context, 196))
            ours[1].append(union(targets, 196))
            for mine, masks in zip(theirs, originals.ijepa(random, 4, 14, 14, fixed=fixed)):
                mine.append(originals.stacked(masks))
        for mine, original in zip(ours, theirs):
            assert_same_distribution(torch.cat(mine), torch.cat(original)[::4])

    def test_bugs_are_off(self) -> None:
        seeds = range(100)
        for bugs in (False, True):
            masks = [ops.multiblock_mask(32, (9, 12), reproduce_bugs=bugs, seed=s) for s in seeds]
            edge = torch.cat([union(t, 108).unflatten(1, (9, 12)) for _, t in masks])
            assert bool(edge[:, -1].any()) == bool(edge[:, :, -1].any()) == (not bugs)

    def test_target_positions_are_uniform(self) -> None:
        _, targets = ops.multiblock_mask(30_000, (14, 14), seed=4)
        first, last = targets[:, :, 0], targets[:, :, -1]
        h, w = int(last[0, 0] // 14 - first[0, 0] // 14) + 1, int(last[0, 0] % 14 - first[0, 0] % 14) + 1
        for k in range(4):
            place = torch.bincount(first[:, k] // 14 * (15 - w) + first[:, k] % 14, minlength=(15 - h) * (15 - w))
            assert len(place) == (15 - h) * (15 - w)
            assert_uniform(place)

    def test_scale_and_aspect_are_independent_but_with_bugs(self) -> None:
        for bugs in (False, True):
            areas, aspects = [], []
            for seed in range(300):
                _, t = ops.multiblock_mask(1, (64, 64), min_keep=0, reproduce_bugs=bugs, seed=seed)
                h, w = int(t[0, 0, -1] // 64 - t[0, 0, 0] // 64) + 1, int(t[0, 0, -1] % 64 - t[0, 0, 0] % 64) + 1
                areas.append(h * w)
                aspects.append(h / w)
            correlation = float(np.corrcoef(areas, aspects)[0, 1])
            assert correlation > 0.95 if bugs else abs(correlation) < 4 / math.sqrt(300)

    def test_a_random_cut_has_no_position_bias(self) -> None:
        """Of the context that a batch of one keeps whole, a cut keeps the end as often as the beginning."""
        kept = {}
        for truncate in ("random", "raster"):
            late = []
            for seed in range(60):
                cut, _ = ops.multiblock_mask(32, (14, 14), truncate=truncate, seed=seed)
                whole, _ = ops.multiblock_mask(1, (14, 14), seed=seed)  # sample 0, uncut
                late.append((float((cut[0] >= 98).double().mean()), float((whole[0] >= 98).double().mean())))
            kept[truncate] = np.mean(late, axis=0)
        assert abs(kept["random"][0] - kept["random"][1]) < 0.03
        assert kept["raster"][0] < kept["raster"][1] - 0.1

    @pytest.mark.parametrize(("blocks", "scale", "part"), [(8, 0.15, 0.63), (2, 0.7, 0.81)], ids=["short", "long"])
    def test_vjepa(self, blocks: int, scale: float, part: float, random: np.random.Generator) -> None:
        """Masked 63% and 81% of 14 x 14 by the original's generator."""
        ours, theirs = [], []
        for seed in range(400):
            _, target = ops.multiblock3d_mask(1, (2, 14, 14), blocks=blocks, spatial_scale=(scale, scale), seed=seed)
            ours.append(one_hot(target, 392))
            theirs.extend(originals.vjepa(random, 1, (2, 14, 14), blocks, scale))
        assert abs(float(torch.cat(ours).double().mean()) - part) < 0.012
        assert_same_distribution(torch.cat(ours)[:, :196], originals.stacked(theirs)[:, :196])

    def test_vjepa_after_the_cut(self) -> None:
        """The encoder sees 23% and predicts 48% of a batch of 24."""
        sizes = [ops.multiblock3d_mask(24, (8, 14, 14), seed=seed) for seed in range(100)]
        assert abs(np.mean([context.shape[1] for context, _ in sizes]) / 1568 - 0.23) < 0.02
        assert abs(np.mean([target.shape[1] for _, target in sizes]) / 1568 - 0.48) < 0.02


class TestSpans:
    @pytest.mark.parametrize(("ratio", "part"), [(0.65, 0.49), (0.8, 0.57)], ids=["wav2vec 2.0", "HuBERT"])
    def test_wav2vec2(self, ratio: float, part: float, random: np.random.Generator) -> None:
        ours = ops.span_mask(4000, 500, ratio, seed=1)
        assert abs(float(ours.double().mean()) - part) < 0.005
        theirs = originals.stacked([originals.wav2vec2(random, 500, ratio, 10) for _ in range(2000)])
        assert_same_distribution(ours, theirs)
        assert int(runs(ours).min()) >= 10
        assert abs(float(runs(ours).double().mean() - runs(theirs).double().mean())) < 0.3

    def test_wav2vec2_reaches_both_ends(self) -> None:
        ours = ops.span_mask(4000, 50, 0.4, seed=1)
        assert abs(float(ours[:, 0].double().mean() - ours[:, -1].double().mean())) < 4 * math.sqrt(0.1 / 4000)

    def test_number_of_spans_is_rounded_at_random(self) -> None:
        """0.5 * 27 / 5 = 2.7 spans."""
        count = ops.span_mask(20_000, 27, 0.5, 5, seed=1, lengths=torch.full((20_000,), 27)).sum(1)
        assert int(count.max()) == 15
        ones = ops.span_mask(20_000, 27, 0.1, 1, seed=1).sum(1)
        assert set(ones.tolist()) == {2, 3}
        assert abs(float(ones.double().mean()) - 2.7) < 4 * 0.46 / math.sqrt(20_000)

    def test_min_spans(self) -> None:
        assert int(ops.span_mask(500, 100, 0.01, 1, min_spans=3, seed=1).sum(1).unique()) == 3

    def test_data2vec(self, random: np.random.Generator) -> None:
        ours = ops.span_mask(6000, 200, 0.5, 5, style="data2vec", seed=1)
        assert ours.sum(1).unique().tolist() == [100]
        theirs = originals.stacked([originals.data2vec_audio(random, 200) for _ in range(3000)])
        assert_same_distribution(ours, theirs)
        assert abs(float(runs(ours).double().mean() - runs(theirs).double().mean())) < 0.15

    @pytest.mark.parametrize("pieces", [1, 2], ids=["words of one piece", "words of two pieces"])
    def test_spanbert(self, pieces: int, random: np.random.Generator) -> None:
        words = torch.arange(120).div(pieces, rounding_mode="floor").expand(4000, 120)
        ours = ops.span_mask(4000, 120, 0.15, style="spanbert", words=words, seed=1)
        assert ours.sum(1).unique().tolist() == [18]
        starts = np.arange(120) % pieces == 0
        theirs = originals.stacked([originals.spanbert(random, starts) for _ in range(1500)])
        assert_same_distribution(ours, theirs)
        assert abs(float(runs(ours).double().mean() - runs(theirs).double().mean())) < 0.2

    @pytest.mark.parametrize(("p", "mean"), [(0.2, 3.80), (0.3, 3.04)])
    def test_spanbert_lengths(self, p: float, mean: float) -> None:
        """The chances of 1 to 10 words, as the thresholds cut the range of a random word."""
        chances = np.diff([0, *_span_thresholds(p, 10), 2**32]) / 2**32
        assert abs(float((chances * np.arange(1, 11)).sum()) - mean) < 0.005
        np.testing.assert_allclose(chances[1:] / chances[:-1], 1 - p, rtol=1e-6)

    def test_no_padding_is_masked(self) -> None:
        lengths = torch.randint(101, (300,))
        for style in ("wav2vec2", "data2vec", "spanbert"):
            mask = ops.span_mask(300, 100, 0.5, 5, style=style, lengths=lengths, seed=1)
            assert not mask[torch.arange(100) >= lengths[:, None]].any()
            if style == "data2vec":
                assert torch.equal(mask.sum(1), (lengths * 0.5).long())
            if style == "spanbert":
                assert torch.equal(mask.sum(1), (lengths * 0.5).ceil().long())

    def test_tokens_of_no_word_are_never_masked_and_end_spans(self) -> None:
        words = torch.arange(60).expand(2000, 60).clone()
        words[:, [0, 30, 59]] = -1
        mask = ops.span_mask(2000, 60, 0.3, style="spanbert", words=words, seed=1)
        assert not mask[:, [0, 30, 59]].any()
        assert mask.sum(1).unique().tolist() == [math.ceil(57 * 0.3)]


class TestTokens:
    def test_counts(self) -> None:
        special = torch.zeros(500, 128, dtype=torch.bool)
        special[:, [0, 60, 127]] = True
        inputs = tokens(500, 128)
        for kwargs, count in (
            ({}, round(128 * 0.15)),
            ({"special": special}, round(125 * 0.15)),
            ({"special": special, "lengths": torch.full((500,), 128)}, round(128 * 0.15)),
            ({"max_predictions": 7}, 7),
            ({"lengths": torch.full((500,), 3)}, 1),
            ({"lengths": torch.zeros(500, dtype=torch.int64)}, 0),
        ):
            chosen = ops.token_mask(inputs, 3, 1000, seed=1, **kwargs)[1] != -100
            assert chosen.sum(1).unique().tolist() == [count]
            assert not (chosen & special).any() or "special" not in kwargs

    def test_positions_are_uniform(self) -> None:
        chosen = ops.token_mask(tokens(20_000, 50), 3, 1000, seed=1)[1] != -100
        assert_uniform_subsets(chosen)

    def test_replacements(self) -> None:
        inputs = tokens(4000, 100)
        out, labels = ops.token_mask(inputs, 3, 1000, 0.5, replace=(0.5, 0.3, 0.2), seed=1)
        chosen = labels != -100
        assert torch.equal(labels[chosen], inputs[chosen])
        assert torch.equal(out[~chosen], inputs[~chosen])
        masked = out[chosen] == 3
        kept = out[chosen] == inputs[chosen]
        n = int(chosen.sum())
        assert abs(float(masked.double().mean()) - 0.5 - 0.3 / 1000) < 4 * math.sqrt(0.25 / n)
        assert abs(float(kept.double().mean()) - 0.2 - 0.3 / 1000) < 4 * math.sqrt(0.16 / n)
        changed = out[chosen][~masked & ~kept]
        counts = torch.bincount(changed, minlength=1000)
        assert_uniform(torch.cat((counts[:3], counts[4:5])))  # tokens that are never kept by chance
        assert int((counts > 0).sum()) == 999  # all of the vocabulary, but for the mask token, counted above

    def test_replace_all(self) -> None:
        out, labels = ops.token_mask(tokens(500, 100), 3, 1000, replace=(1.0, 0.0, 0.0), seed=1)
        assert torch.equal(out == 3, labels != -100)
        out, labels = ops.token_mask(tokens(500, 100), 3, 1000, replace=(0.0, 0.0, 1.0), seed=1)
        assert torch.equal(out, tokens(500, 100))

    def test_whole_words(self, random: np.random.Generator) -> None:
        sizes = [1, 2, 3, 1, 4, 1, 1, 2, 5, 1, 3, 1, 2, 1, 1, 6, 1, 2, 1, 1]
        words = torch.repeat_interleave(torch.arange(20), torch.tensor(sizes))
        length = len(words)
        chosen = ops.token_mask(tokens(6000, length), 3, 1000, 0.15, words=words.expand(6000, -1), seed=1)[1] != -100
        for word in range(20):
            pieces = chosen[:, words == word]
            assert torch.equal(pieces.all(1), pieces.any(1))
        candidates = [np.flatnonzero(words.numpy() == word).tolist() for word in range(20)]
        theirs = originals.stacked([originals.bert(random, candidates, length, length) for _ in range(3000)])
        assert_same_distribution(chosen, theirs)

    def test_special_ids(self) -> None:
        inputs = tokens(300, 60)
        for special in ([5, 6, 7], torch.tensor([5, 6, 7])):
            chosen = ops.token_mask(inputs, 3, 1000, 0.9, special=special, seed=1)[1] != -100
            assert not (chosen & (inputs < 8)).any()


class TestCorruption:
    def test_shapes_of_t5(self) -> None:
        inputs, targets = ops.span_corruption(torch.randint(5, 32_000, (2, 568)), 32_100)
        assert (inputs.shape[1], targets.shape[1]) == (512, 114)

    def test_parts_come_back(self) -> None:
        """Sentinels in the inputs replaced by what follows them in the targets give the sequence."""
        sequence = tokens(50, 40)
        inputs, targets = ops.span_corruption(sequence, 1000, 0.3, 2.0, seed=1)
        spans = round(12 / 2)
        assert torch.equal(inputs[:, -1], torch.ones(50, dtype=torch.int64)) and bool((targets[:, -1] == 1).all())
        for source, i, t in zip(sequence.tolist(), inputs[:, :-1].tolist(), targets[:, :-1].tolist()):
            sentinels = [x for x in i if x >= 1000 - spans]
            assert sentinels == [x for x in t if x >= 1000 - spans] == [999 - k for k in range(spans)]
            assert t[0] == 999 and i[0] < 1000 - spans
            back = []
            for x in i:
                if x < 1000 - spans:
                    back.append(x)
                    continue
                span = itertools.takewhile(lambda y: y < 1000 - spans, t[t.index(x) + 1 :])
                back.extend(span)
            assert back == source

    def test_every_partition_is_equally_likely(self) -> None:
        sequence = torch.arange(5, 13).expand(40_000, 8)
        inputs, _ = ops.span_corruption(sequence, 1000, 0.5, 2.0, seed=1)  # 4 of 8 in 2 spans
        counts = Counter(map(tuple, inputs.tolist()))
        assert len(counts) == 3 * 3
        assert_uniform(torch.tensor(list(counts.values())))

    def test_is_the_original(self, random: np.random.Generator) -> None:
        sequence = torch.arange(5, 105).expand(6000, 100)
        inputs, _ = ops.span_corruption(sequence, 1000, seed=1)
        ours = ~one_hot(torch.where(inputs >= 105, 0, (inputs - 5).clamp(min=0)), 100)
        ours[:, 0] = False  # the first token is never noise, and sentinels were sent there
        theirs = originals.stacked([originals.t5(random, 100, 15, 5) for _ in range(3000)])
        assert not theirs[:, 0].any() and bool(ours[:, -1].all()) and bool(theirs[:, -1].all())
        assert_same_distribution(ours, theirs)
