# SPDX-License-Identifier: Apache-2.0
"""What the tests of the masks share: every public function with arguments, every op with its reference, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels import ops
from sslkernels.reference import _masks_sequence as sequence
from sslkernels.reference import masks as grid

LOG_ASPECT = math.log(0.3)
REFERENCES = {
    "random_mask": grid.random_mask,
    "block_mask": grid.block_mask,
    "inverse_block_mask": grid.inverse_block_mask,
    "multiblock_mask": grid.multiblock_mask,
    "multiblock3d_mask": grid.multiblock3d_mask,
    "span_mask": sequence.span_mask,
    "centred_span_mask": sequence.centred_span_mask,
    "word_span_mask": sequence.word_span_mask,
    "token_mask": sequence.token_mask,
    "span_corruption": sequence.span_corruption,
}


class Call(NamedTuple):
    function: Callable[..., Any]
    kwargs: dict[str, Any]

    def __call__(self, **changed: Any) -> Any:
        return self.function(**{**self.kwargs, **changed})

    def tensors(self, **changed: Any) -> tuple[Tensor, ...]:
        out = self(**changed)
        return out if isinstance(out, tuple) else (out,)


def tokens(batch: int = 5, length: int = 40) -> Tensor:
    return torch.randint(5, 900, (batch, length), generator=torch.Generator().manual_seed(3))


def word_ids(batch: int, length: int) -> Tensor:
    """Words of about two pieces, and a few tokens that belong to none."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, (batch, length), generator=generator).cumsum(1)
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.05, -1)


def calls() -> dict[str, Call]:
    """Each public function in each of its styles."""
    batch = {"batch_size": 5}
    return {
        "random": Call(ops.random_mask, {**batch, "length": 50, "ratio": 0.7}),
        "tube": Call(ops.tube_mask, {**batch, "frames": 3, "grid": (4, 5)}),
        "block dinov2": Call(ops.block_mask, {**batch, "grid": (8, 9), "ratio": (0.1, 0.5), "probability": 0.8}),
        "block beit": Call(ops.block_mask, {**batch, "grid": (14, 14), "ratio": 75 / 196, "style": "beit"}),
        "block ibot": Call(ops.block_mask, {**batch, "grid": (8, 9), "ratio": (0.1, 0.5), "style": "ibot"}),
        "inverse": Call(ops.inverse_block_mask, {**batch, "grid": (7, 8)}),
        "multiblock": Call(ops.multiblock_mask, {**batch, "grid": (14, 14)}),
        "multiblock bugs": Call(
            ops.multiblock_mask, {**batch, "grid": (9, 14), "reproduce_bugs": True, "truncate": "raster"}
        ),
        "multiblock fixed": Call(ops.multiblock_mask, {**batch, "grid": (14, 14), "context_tokens": 12}),
        "multiblock3d": Call(ops.multiblock3d_mask, {**batch, "grid": (4, 7, 8)}),
        "span wav2vec2": Call(ops.span_mask, {**batch, "length": 100}),
        "span data2vec": Call(ops.span_mask, {**batch, "length": 100, "ratio": 0.5, "span": 5, "style": "data2vec"}),
        "span spanbert": Call(ops.span_mask, {**batch, "length": 100, "ratio": 0.15, "style": "spanbert"}),
        "token": Call(ops.token_mask, {"tokens": tokens(), "mask_token": 3, "vocab_size": 1000}),
        "token words": Call(
            ops.token_mask, {"tokens": tokens(), "mask_token": 3, "vocab_size": 1000, "words": word_ids(5, 40)}
        ),
        "corruption": Call(ops.span_corruption, {"tokens": tokens(), "vocab_size": 1000, "ratio": 0.3}),
    }


CALLS = calls()
# a sample's mask does not depend on the other samples
ALONE = [x for x in CALLS if x not in ("block dinov2", "multiblock", "multiblock bugs", "multiblock3d")]


def op(name: str) -> Any:
    return getattr(torch.ops.sslkernels, name)


@contextmanager
def setting(threads: int, level: int) -> Iterator[None]:
    """Another number of threads and instruction set."""
    before = torch.get_num_threads(), torch.ops.sslkernels.cpu_level()
    torch.set_num_threads(threads)
    torch.ops.sslkernels.set_cpu_level(level)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.ops.sslkernels.set_cpu_level(before[1])


def compare(name: str, seed: int, *args: Any) -> tuple[Tensor, ...]:
    """The kernel gives what the reference gives, bit for bit, at every instruction set and number of threads."""
    tensor = torch.tensor(seed)
    expected = REFERENCES[name](tensor, *args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for threads, level in ((1, 0), (1, 1), (2, 2), (1, 2)):
        with setting(threads, level):
            got = op(name)(tensor, *args)
        for x, y in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert torch.equal(x, y), f"{threads} threads, level {level}"
    return expected


def one_hot(ids: Tensor, length: int) -> Tensor:
    """True at the ids: (..., length) of (..., K)."""
    return torch.zeros(*ids.shape[:-1], length, dtype=torch.bool).scatter(-1, ids, True)


def chi_square_limit(freedom: int) -> float:
    """What a chi-square variable exceeds once in 30,000 (Wilson and Hilferty's form)."""
    return freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_uniform(counts: Tensor) -> None:
    """Independent draws that fell into the cells, all equally likely."""
    counts = counts.flatten().double()
    expected = counts.mean()
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(len(counts) - 1)


def assert_uniform_subsets(masks: Tensor) -> None:
    """(N, L) subsets of one size hold each position equally often; the counts share a size, so they correlate."""
    n, length = masks.shape
    p = masks.double().mean()
    statistic = ((masks.sum(0) - n * p) ** 2).sum() / (n * p * (1 - p)) * (length - 1) / length
    assert float(statistic) < chi_square_limit(length - 1)


def assert_same_distribution(first: Tensor, second: Tensor, *, groups: int = 1) -> None:
    """(N, L) and (M, L) masks of two generators hold each position equally often, and as many positions on average.

    Of `groups` samples that share a draw only one counts as independent.
    """
    n, m = (len(x) / groups for x in (first, second))
    p, q = first.double().mean(0), second.double().mean(0)
    both = (n * p + m * q) / (n + m)
    z = (p - q) / (both * (1 - both)).clamp(min=1e-3).mul(1 / n + 1 / m).sqrt()
    assert float(z.abs().max()) < 5
    assert float((z**2).mean()) < 3  # neighbours correlate, so that this is far from its value for independent ones
    sizes = [x.double().sum(1) for x in (first, second)]
    error = math.sqrt(float(sizes[0].var()) / n + float(sizes[1].var()) / m)
    assert abs(float(sizes[0].mean() - sizes[1].mean())) <= 4 * error + 1e-9
