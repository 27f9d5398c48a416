# SPDX-License-Identifier: Apache-2.0
"""What the masks refuse: by the argument's name, with what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from masks_cases import CALLS, REFERENCES, tokens

import sslkernels

NAN, INF = float("nan"), float("inf")

# call, error, message, what to change
BAD: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    *(
        (name, ValueError, r"seed and generator, got both", {"seed": 1, "generator": torch.Generator()})
        for name in CALLS
    ),
    *((name, TypeError, "seed must be an integer or a tensor, got float", {"seed": 1.5}) for name in CALLS),
    *(
        (name, ValueError, "batch_size must be at least 0, got -1", {"batch_size": -1})
        for name in CALLS
        if "batch_size" in CALLS[name].kwargs
    ),
    *(
        (name, ValueError, rf"^ratio must be in \(0, 1\), got {ratio}", {"ratio": ratio})
        for name in CALLS
        if not name.startswith("multiblock")
        for ratio in (0, 1, 1.5, -0.1, NAN)
    ),
    *(
        (name, ValueError, r"grid must be \d integers, got 14", {"grid": 14})
        for name in CALLS
        if "grid" in CALLS[name].kwargs
    ),
    *(
        (
            name,
            ValueError,
            r"grid\[1\] must be at least \d, got 0",
            {"grid": (*CALLS[name].kwargs["grid"][:1], 0, 9)[:n]},
        )
        for name in CALLS
        if "grid" in CALLS[name].kwargs
        for n in [len(CALLS[name].kwargs["grid"])]
    ),
    ("random", TypeError, "batch_size must be an integer, got float", {"batch_size": 2.0}),
    ("random", TypeError, "length must be an integer, got bool", {"length": True}),
    ("random", ValueError, r"length must be in \[2, \d+\], got 1", {"length": 1}),
    ("random", ValueError, "ratio must leave something visible .* of 50, got 0.99", {"ratio": 0.99}),
    ("random", TypeError, "ratio must be a number, got str", {"ratio": "half"}),
    ("tube", ValueError, "frames must be at least 1, got 0", {"frames": 0}),
    ("tube", ValueError, "ratio must leave something visible and something masked of 20", {"ratio": 0.01}),
    ("inverse", ValueError, r"block_size must be in \[1, 7\], got 8", {"block_size": 8}),
    ("inverse", ValueError, r"adjust must be in \[0.0, 1.0\), got 1.0", {"adjust": 1.0}),
    ("block beit", ValueError, "style must be one of 'dinov2', 'ibot', 'beit', got 'mae'", {"style": "mae"}),
    ("block beit", ValueError, r"ratio must rise within", {"ratio": (0.5, 0.1)}),
    ("block beit", ValueError, r"ratio\[0\] must be in", {"ratio": (-0.5, 0.1)}),
    ("block beit", ValueError, r"ratio must be a pair \(smallest, largest\)", {"ratio": (0.1, 0.2, 0.3)}),
    ("block beit", ValueError, r"min_patches must be in \[1, 196\], got 0", {"min_patches": 0}),
    ("block beit", ValueError, r"min_patches must be in \[1, 196\], got 197", {"min_patches": 197}),
    ("block beit", ValueError, "max_patches must be at least 1, got 0", {"max_patches": 0}),
    ("block beit", ValueError, r"aspect must rise within \(0.0, inf\]", {"aspect": (0.0, 1.0)}),
    ("block beit", ValueError, r"aspect must rise within", {"aspect": (1.0, INF)}),
    ("block beit", ValueError, r"attempts must be at least 1, got 0", {"attempts": 0}),
    ("block beit", ValueError, r"probability must be in \[0.0, 1.0", {"probability": 1.1}),
    ("block beit", ValueError, r"grid\[0\] must be at least 2, got 1", {"grid": (1, 14)}),
    ("multiblock", ValueError, "targets must be at least 1, got 0", {"targets": 0}),
    ("multiblock", ValueError, r"context_scale must rise within \(0.0, 1.0\]", {"context_scale": (0.9, 1.1)}),
    ("multiblock", ValueError, r"target_scale must rise within", {"target_scale": (0.0, 0.1)}),
    ("multiblock", TypeError, r"target_scale\[0\] must be a number, got str", {"target_scale": ("a", 0.1)}),
    ("multiblock", ValueError, r"target_aspect must rise within", {"target_aspect": (1.5, 0.75)}),
    (
        *("multiblock", ValueError, r"min_keep must be less than the smallest context block \(3 x 3\), got 10"),
        {"grid": (4, 4)},
    ),
    ("multiblock", ValueError, "truncate must be one of 'random', 'raster', got 'last'", {"truncate": "last"}),
    ("multiblock", ValueError, r"context_tokens must be in \[1, 169\], got 170", {"context_tokens": 170}),
    (
        *("multiblock", ValueError, r"context_tokens must be at most the \d+ of this batch, got 169$"),
        {"context_tokens": 169, "seed": 1},
    ),
    ("multiblock3d", ValueError, "blocks must be at least 1, got 0", {"blocks": 0}),
    ("multiblock3d", ValueError, "spatial_scale must rise", {"spatial_scale": (0.5, 0.2)}),
    ("multiblock3d", ValueError, "temporal_scale must rise", {"temporal_scale": (0.5, 1.2)}),
    ("multiblock3d", ValueError, r"max_context_frames must be in \[1, 4\], got 5", {"max_context_frames": 5}),
    ("multiblock3d", ValueError, r"max_keep must be at least 1, got 0", {"max_keep": 0}),
    (
        *("multiblock3d", ValueError, r"^blocks must leave a context, got 8 of 4 x 7 x 7 that cover the clip$"),
        {"grid": (4, 7, 7), "spatial_scale": (1.0, 1.0), "aspect": (1.0, 1.0)},
    ),
    ("span wav2vec2", ValueError, r"span must be in \[1, 100\], got 101", {"span": 101}),
    ("span wav2vec2", ValueError, "span must be in", {"span": 0}),
    ("span wav2vec2", ValueError, "min_spans must be at least 0, got -1", {"min_spans": -1}),
    ("span wav2vec2", ValueError, "style must be one of 'wav2vec2', 'data2vec', 'spanbert'", {"style": "bert"}),
    ("span wav2vec2", TypeError, "lengths must be a torch.Tensor, got list", {"lengths": [1] * 5}),
    ("span wav2vec2", TypeError, "lengths must be torch.int64, got torch.int32", {"lengths": torch.ones(5).int()}),
    ("span wav2vec2", ValueError, r"lengths must have shape \(5,\), got \(4,\)", {"lengths": torch.ones(4).long()}),
    ("span wav2vec2", ValueError, r"lengths must be in \[0, 100\], got 101", {"lengths": torch.full((5,), 101)}),
    ("span wav2vec2", ValueError, r"lengths must be in \[0, 100\], got -1", {"lengths": torch.full((5,), -1)}),
    ("span wav2vec2", ValueError, "words must come with style='spanbert'", {"words": torch.ones(5, 100).long()}),
    ("span data2vec", ValueError, "adjust must be in", {"adjust": -0.1}),
    ("span spanbert", ValueError, r"geometric must be in \(0, 1\), got 1", {"geometric": 1}),
    (
        "span spanbert",
        ValueError,
        r"words must have shape \(5, 100\), got \(5, 99\)",
        {"words": torch.ones(5, 99).long()},
    ),
    ("span spanbert", TypeError, "words must be torch.int64, got torch.float32", {"words": torch.ones(5, 100)}),
    ("token", TypeError, "tokens must be a torch.Tensor, got list", {"tokens": [[1, 2]]}),
    ("token", TypeError, "tokens must be torch.int64, got torch.int32", {"tokens": tokens().int()}),
    ("token", ValueError, r"tokens must be 2-D \(batch, length\), got shape \(40,\)", {"tokens": tokens()[0]}),
    ("token", ValueError, "vocab_size must be in", {"vocab_size": 0}),
    ("token", ValueError, "mask_token must be at least 0, got -1", {"mask_token": -1}),
    ("token", TypeError, "special must be torch.bool, got torch.int64", {"special": torch.ones(5, 40).long()}),
    ("token", ValueError, r"special must have shape \(5, 40\), got \(40,\)", {"special": torch.ones(40).bool()}),
    ("token", ValueError, r"special\[1\] must be at least 0, got -1", {"special": [1, -1]}),
    ("token", ValueError, r"words must have shape \(5, 40\)", {"words": torch.ones(40).long()}),
    ("token", ValueError, r"lengths must be in \[0, 40\], got 41", {"lengths": torch.full((5,), 41)}),
    ("token", ValueError, "max_predictions must be at least 1, got 0", {"max_predictions": 0}),
    ("token", ValueError, "replace must be three parts", {"replace": (0.8, 0.2)}),
    ("token", ValueError, "replace must add up to 1, got", {"replace": (0.8, 0.1, 0.2)}),
    ("token", ValueError, r"replace\[2\] must be in", {"replace": (0.8, 0.4, -0.2)}),
    ("corruption", ValueError, "the length of tokens must be at least 2, got 1", {"tokens": tokens()[:, :1]}),
    ("corruption", ValueError, r"mean_span must be in \[1.0, inf\), got 0.5", {"mean_span": 0.5}),
    (
        *("corruption", ValueError, "ratio and mean_span must leave a kept token for each of 36 spans, got 4"),
        {"ratio": 0.9, "mean_span": 1.0},
    ),
    ("corruption", ValueError, r"vocab_size must be in \[5, \d+\], got 4", {"vocab_size": 4}),
    ("corruption", ValueError, "tokens must be below the 4 sentinels from 796 on, got 8", {"vocab_size": 800}),
    ("corruption", ValueError, "eos must be at least 0, got -1", {"eos": -1}),
]


@pytest.mark.parametrize(("name", "error", "message", "changed"), BAD, ids=[f"{x[0]}: {x[2]}" for x in BAD])
def test_refused(name: str, error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        CALLS[name](**changed)


@pytest.mark.parametrize("name", CALLS)
def test_these_arguments_are_taken(name: str) -> None:
    CALLS[name]()


@pytest.mark.parametrize("name", ["multiblock", "multiblock3d"])
def test_a_seed_that_decides_shapes_is_on_the_cpu(name: str) -> None:
    with pytest.raises(ValueError, match="seed must be on the CPU, as it decides shapes, got meta"):
        CALLS[name](seed=torch.zeros((), dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("name", ["span wav2vec2", "token"])
def test_other_devices(name: str) -> None:
    with pytest.raises(ValueError, match="lengths must be on cpu, got meta"):
        CALLS[name](lengths=torch.zeros(5, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="seed must be on cpu, got meta"):
        CALLS[name](seed=torch.zeros((), dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, dtype=torch.int64), torch.zeros(()), torch.zeros((), dtype=torch.int32)], ids=str
)
def test_seed_tensor(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="seed must be a number or one int64 element"):
        CALLS["random"](seed=x)


def test_lengths_out_of_range_stay_harmless_where_nobody_looks() -> None:
    """As on a device whose values are not read: clamped, in the kernel and in the reference."""
    seed, lengths = torch.tensor(1), torch.tensor([-5, 1000])
    rest = {"span_mask": (0.5, 5, 0), "centred_span_mask": (0.5, 0.1, 5), "word_span_mask": (None, 0.5, [2**31])}
    for name, args in rest.items():
        for function in (getattr(torch.ops.sslkernels, name), REFERENCES[name]):
            got = function(seed, 2, 40, lengths, *args)
            assert torch.equal(got, function(seed, 2, 40, lengths.clamp(0, 40), *args))


def test_values_on_request() -> None:
    with sslkernels.check_values(), pytest.raises(ValueError, match="lengths must be in"):
        CALLS["span wav2vec2"](lengths=torch.full((5,), 101))
