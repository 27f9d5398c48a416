# SPDX-License-Identifier: Apache-2.0
"""The masks: kernel against reference bit for bit, and what holds for every one of them."""

from __future__ import annotations

import math
from typing import Any

import masks_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks_cases import ALONE, CALLS, LOG_ASPECT, compare

from sslkernels import ops

SEEDS = st.integers(-(2**63), 2**63 - 1)
BATCHES = st.sampled_from([0, 1, 2, 17])
SIDES = st.integers(2, 13)
PARTS = st.floats(0.02, 0.98)
PAIRS = st.tuples(PARTS, PARTS).map(sorted)
ASPECTS = st.tuples(st.floats(0.2, 4.0), st.floats(0.2, 4.0)).map(sorted)
FLAGS = st.tuples(st.booleans(), st.booleans(), st.booleans())
examples = settings(max_examples=40, deadline=None)


class TestKernelIsReference:
    @examples
    @given(seed=SEEDS, batch=BATCHES, frames=st.integers(1, 3), places=st.integers(2, 300), data=st.data())
    def test_random(self, seed: int, batch: int, frames: int, places: int, data: st.DataObject) -> None:
        compare("random_mask", seed, batch, frames, places, data.draw(st.integers(0, places)))

    def test_random_of_many(self) -> None:
        """So many that equal keys occur: the earlier place comes first."""
        keys = cases.grid.words(torch.tensor(8), cases.grid.RANDOM, 1, 0, torch.arange(300_000))
        assert keys.unique().numel() < keys.numel()
        compare("random_mask", 8, 1, 1, 300_000, 150_000)

    @examples
    @given(SEEDS, st.tuples(BATCHES, SIDES, SIDES), PAIRS, st.integers(1, 20), st.integers(1, 60), ASPECTS, st.data())
    def test_block(self, seed, sizes, ratio, smallest, most, aspect, data) -> None:
        logs = [math.log(x) for x in aspect]
        rest = data.draw(st.tuples(st.integers(1, 12), st.floats(0, 1), st.booleans(), st.booleans()))
        compare("block_mask", seed, *sizes, *ratio, float(smallest), float(most), *logs, *rest)

    def test_block_of_dinov2(self) -> None:
        logs = LOG_ASPECT, -LOG_ASPECT
        compare("block_mask", 5, 40, 37, 37, 0.1, 0.5, 4.0, 684.0, *logs, 10, 0.5, True, True)

    @examples
    @given(SEEDS, BATCHES, SIDES, SIDES, st.integers(0, 30), st.data())
    def test_inverse_block(self, seed: int, batch: int, height: int, width: int, blocks: int, data: Any) -> None:
        side, keep = data.draw(st.integers(1, min(height, width))), data.draw(st.integers(0, height * width))
        compare("inverse_block_mask", seed, batch, height, width, blocks, side, keep)

    @examples
    @given(SEEDS, st.tuples(BATCHES, SIDES, SIDES, st.integers(1, 6), PAIRS, PAIRS, ASPECTS, st.integers(0, 20)), FLAGS)
    def test_multiblock(self, seed: int, args: Any, flags: Any) -> None:
        compare("multiblock_mask", seed, *args, *flags, None)

    def test_multiblock_of_fixed_length(self) -> None:
        scales = [0.85, 1.0], [0.15, 0.2], [0.75, 1.5]
        context, _ = compare("multiblock_mask", 3, 30, 14, 14, 4, *scales, 10, False, False, False, 12)
        assert context.shape == (30, 12)

    @examples
    @given(
        *(SEEDS, BATCHES, st.integers(1, 5), st.tuples(SIDES, SIDES, st.integers(1, 5))),
        *(st.tuples(PAIRS, PAIRS, ASPECTS), st.booleans(), st.sampled_from([None, 1, 9])),
    )
    def test_multiblock3d(self, seed, batch, frames, sizes, scales, raster, keep) -> None:
        args = batch, frames, *sizes, *scales, raster, max(frames - 1, 1), keep
        try:
            compare("multiblock3d_mask", seed, *args)
        except ValueError as error:  # then the kernel says so as well
            with pytest.raises(RuntimeError, match=str(error)):
                cases.op("multiblock3d_mask")(torch.tensor(seed), *args)

    @examples
    @given(SEEDS, BATCHES, st.integers(1, 150), PARTS, st.data())
    def test_spans(self, seed: int, batch: int, length: int, ratio: float, data: st.DataObject) -> None:
        span = data.draw(st.integers(1, length))
        lengths = data.draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
        compare("span_mask", seed, batch, length, lengths, ratio, span, data.draw(st.integers(0, 4)))
        density = (ratio + data.draw(st.floats(0, 0.5))) / span
        compare("centred_span_mask", seed, batch, length, lengths, ratio, density, span)
        words = cases.word_ids(batch, length) if data.draw(st.booleans()) else None
        compare("word_span_mask", seed, batch, length, lengths, words, ratio, [2**30, 2**31, 2**32 - 1])

    @examples
    @given(SEEDS, BATCHES, st.integers(1, 150), PARTS, st.booleans(), st.booleans(), st.booleans(), st.data())
    def test_tokens(self, seed, batch, length, ratio, has_words, has_special, has_lengths, data) -> None:
        args = (
            torch.rand(batch, length) < 0.2 if has_special else None,
            cases.word_ids(batch, length) if has_words else None,
            torch.randint(length + 1, (batch,)) if has_lengths else None,
        )
        most = data.draw(st.sampled_from([1, 7, length + 1]))
        compare("token_mask", seed, cases.tokens(batch, length), *args, 3, 1000, ratio, most, 0.8, 0.9, -100)

    @examples
    @given(SEEDS, BATCHES, st.integers(2, 150), st.sampled_from([None, 1]), st.data())
    def test_corruption(self, seed: int, batch: int, length: int, eos: int | None, data: st.DataObject) -> None:
        noise = data.draw(st.integers(1, length - 1))
        spans = data.draw(st.integers(1, min(noise, length - noise)))
        compare("span_corruption", seed, cases.tokens(batch, length), noise, spans, 1000, eos)


every = pytest.mark.parametrize("name", CALLS)


def equal(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(first, second, strict=True))


class TestSeeds:
    @every
    def test_seed_decides(self, name: str) -> None:
        call = CALLS[name]
        assert equal(call.tensors(seed=7), call.tensors(seed=7))
        assert equal(call.tensors(seed=7), call.tensors(seed=torch.tensor([7])))
        assert not equal(call.tensors(seed=7), call.tensors(seed=8))

    @every
    def test_generator_decides(self, name: str) -> None:
        call, generator = CALLS[name], torch.Generator().manual_seed(5)
        first, second = call.tensors(generator=generator), call.tensors(generator=generator)
        assert not equal(first, second)
        assert equal(first, call.tensors(generator=generator.manual_seed(5)))

    @every
    def test_default_generator(self, name: str) -> None:
        call = CALLS[name]
        torch.manual_seed(5)
        first = call.tensors()
        assert not equal(first, call.tensors())
        torch.manual_seed(5)
        assert equal(first, call.tensors())

    @pytest.mark.parametrize("name", ALONE)
    def test_a_sample_does_not_depend_on_the_others(self, name: str) -> None:
        call = CALLS[name]
        if "tokens" in call.kwargs:
            rows = {key: x[:2] for key, x in call.kwargs.items() if isinstance(x, torch.Tensor)}
        else:
            rows = {"batch_size": 2}
        few, many = call.tensors(seed=7, **rows), call.tensors(seed=7)
        assert equal(few, tuple(x[:2] for x in many))

    @every
    def test_samples_differ(self, name: str) -> None:
        call = CALLS[name]
        changed = {"tokens": cases.tokens()[:1].expand(5, -1)} if "tokens" in call.kwargs else {}
        for x in call.tensors(seed=7, **changed):
            if x.flatten(1).shape[1] > 10:
                assert len(x.flatten(1).unique(dim=0)) >= 4  # of 5

    def test_functions_do_not_share_words(self) -> None:
        """One seed for several masks of a step is safe."""
        visible, _ = ops.random_mask(64, 64, 0.5, seed=3)
        spans = ops.span_mask(64, 64, 0.5, 1, seed=3)
        agreement = (cases.one_hot(visible, 64) == spans).double().mean()
        assert abs(float(agreement) - 0.5) < 4 * 0.5 / 64


class TestIds:
    @pytest.mark.parametrize("name", ["random", "tube", "inverse"])
    def test_visible_and_masked_are_a_partition(self, name: str) -> None:
        visible, masked = CALLS[name]()
        every_id = torch.cat((visible, masked), 1).sort(1).values
        assert torch.equal(every_id, torch.arange(every_id.shape[1]).expand_as(every_id))

    @pytest.mark.parametrize("name", [name for name in CALLS if isinstance(CALLS[name](), tuple) and name[0] != "t"])
    def test_ids_ascend(self, name: str) -> None:
        for ids in CALLS[name].tensors():
            if "tokens" not in CALLS[name].kwargs:
                assert ids.dtype == torch.int64
                assert bool((ids.diff(dim=-1) > 0).all())

    def test_tube_is_the_same_in_every_frame(self) -> None:
        visible, masked = ops.tube_mask(4, 6, (5, 7), 0.6, seed=1)
        for ids in (visible, masked):
            first, *others = (ids - 35 * (ids // 35)).unflatten(1, (6, -1)).unbind(1)
            assert all(torch.equal(x, first) for x in others)

    @pytest.mark.parametrize("name", ["multiblock", "multiblock bugs", "multiblock fixed"])
    def test_context_and_targets_are_disjoint(self, name: str) -> None:
        for seed in range(20):
            context, targets = CALLS[name](seed=seed, min_keep=0)
            assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()

    def test_overlap_is_allowed_only_on_demand(self) -> None:
        kwargs = {"batch_size": 50, "grid": (14, 14), "seed": 1}
        context, targets = ops.multiblock_mask(allow_overlap=True, **kwargs)
        assert (context[:, :, None] == targets.flatten(1)[:, None]).any()

    def test_clip_context_and_target_are_disjoint(self) -> None:
        context, target = ops.multiblock3d_mask(50, (4, 14, 14), seed=1)
        assert not (context[:, :, None] == target[:, None]).any()

    def test_context_ends_with_max_context_frames(self) -> None:
        context, target = ops.multiblock3d_mask(9, (4, 6, 6), max_context_frames=2, seed=1)
        assert int(context.max()) < 2 * 36 <= int(target.max())

    def test_max_keep(self) -> None:
        assert ops.multiblock3d_mask(9, (4, 6, 6), max_keep=5, seed=1)[0].shape == (9, 5)

    @every
    def test_empty_batch(self, name: str) -> None:
        call = CALLS[name]
        changed = {key: x[:0] for key, x in call.kwargs.items() if isinstance(x, torch.Tensor)}
        for x in call.tensors(**(changed or {"batch_size": 0})):
            assert x.shape[0] == 0


class TestStrides:
    def test_tokens_words_special_and_lengths(self) -> None:
        tokens, words, special = cases.tokens(6, 80), cases.word_ids(6, 80), torch.rand(6, 80) < 0.2
        lengths = torch.tensor([80, 3, 40, 9, 80, 9])

        def views(x: torch.Tensor) -> list[torch.Tensor]:
            return [x[::2, 1::2], x.t().contiguous().t()[::2, 1::2]]

        kwargs = {"mask_token": 3, "vocab_size": 1000, "seed": 1, "lengths": lengths[::2].clamp(max=40)}
        for i in range(2):
            given = {"tokens": views(tokens)[i], "words": views(words)[i], "special": views(special)[i]}
            plain = {key: x.contiguous() for key, x in given.items()}
            assert equal(ops.token_mask(**given, **kwargs), ops.token_mask(**plain, **kwargs))
        expanded = words[:1].expand(3, 80)
        spans = {"batch_size": 3, "length": 80, "ratio": 0.2, "style": "spanbert", "seed": 1}
        assert torch.equal(ops.span_mask(words=expanded, **spans), ops.span_mask(words=expanded.contiguous(), **spans))
        row = tokens[:1].expand(3, 80)
        assert equal(ops.span_corruption(row, 1000, seed=1), ops.span_corruption(row.contiguous(), 1000, seed=1))
