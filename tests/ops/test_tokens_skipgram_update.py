# SPDX-License-Identifier: Apache-2.0
"""skipgram_update_ against word2vec's loop written in plain Python, and the alias table against its weights."""

from __future__ import annotations

import math
import mmap
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels.ops import AliasTable, alias_table, skipgram_update_
from sslkernels.ops._skipgram_update import _update_
from sslkernels.reference import _philox
from sslkernels.reference import tokens as reference

F32, F64 = torch.float32, torch.float64


class Text:
    """Sentences over V words with tables of D values; some words are frequent."""

    def __init__(self, lengths: list[int], v: int = 13, d: int = 5, dtype: torch.dtype = F64) -> None:
        self.weights = 1 / torch.arange(1, v + 1).double()
        count = sum(lengths)
        self.tokens = torch.multinomial(self.weights, count, replacement=True) if count else torch.zeros(0).long()
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.u, self.v = torch.randn(v, d).to(dtype) * 0.3, torch.randn(v, d).to(dtype) * 0.3
        self.table = alias_table(self.weights**0.75)
        self.keep = (0.3 / self.weights).clamp(max=1.0).float()

    def trained(self, lr: float = 0.05, **options: Any) -> tuple[Tensor, Tensor]:
        u, v = self.u.clone(), self.v.clone()
        skipgram_update_(u, v, self.tokens, self.offsets, lr, self.table, **{"seed": 7, "keep": self.keep, **options})
        return u, v

    def written_out(
        self, lr: float = 0.05, window: int = 5, negatives: int = 5, seed: int = 7, keep: Any = "own"
    ) -> tuple[np.ndarray, np.ndarray]:
        """word2vec.c::TrainModelThread in float64, one number at a time; its random numbers are ours."""
        u, v = (x.double().numpy().copy() for x in (self.u, self.v))
        keep = self.keep if isinstance(keep, str) else keep

        def word(position: int, index: int) -> int:
            return int(_philox.words(torch.tensor(seed), torch.tensor(position), torch.tensor(index)))

        starts = self.offsets.tolist()
        for begin, end in pairwise(starts):
            places = [
                p for p in range(begin, end) if keep is None or (word(p, 0) >> 8) / 2**24 < keep[self.tokens[p]].item()
            ]
            for i, p in enumerate(places):
                centre, b, drawn = int(self.tokens[p]), word(p, 1) * window >> 32, 0
                for a in range(b, window * 2 + 1 - b):
                    j = i - window + a
                    if a == window or not 0 <= j < len(places):
                        continue
                    context, step = int(self.tokens[places[j]]), np.zeros(u.shape[1])
                    for k in range(negatives + 1):
                        target, label = centre, 1.0
                        if k:
                            product = word(p, 4 + drawn) * len(u)
                            column, drawn = product >> 32, drawn + 1
                            own = product % 2**32 < int(self.table.threshold[column])
                            target, label = column if own else int(self.table.alias[column]), 0.0
                            if target == centre:
                                continue
                        g = (label - 1 / (1 + math.exp(-float(u[context] @ v[target])))) * lr
                        step += g * v[target]
                        v[target] += g * u[context]
                    u[context] += step
        return u, v

    def check(self, tolerance: float, **options: Any) -> None:
        expected = self.written_out(**options)
        for x, y in zip(self.trained(**options), expected, strict=True):
            torch.testing.assert_close(x.double(), torch.from_numpy(y), rtol=0, atol=tolerance)


@pytest.mark.parametrize("negatives", [0, 1, 5, 6, 12])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_is_word2vecs_loop(window: int, negatives: int) -> None:
    """12 negatives of 13 words: draws come again within a pair, and see what the first one changed."""
    Text([17, 0, 1, 2, 23]).check(1e-10, window=window, negatives=negatives)


@pytest.mark.parametrize("d", [1, 3, 4, 8, 15, 16, 17, 31, 33, 100])
def test_every_width(d: int, level: int) -> None:
    """Vectors of every size, and what is left behind them."""
    Text([19], d=d).check(1e-10)
    Text([19], d=d, dtype=F32).check(2e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=4), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**63 - 1))
def test_any_text(lengths: list[int], v: int, d: int, seed: int) -> None:
    Text(lengths, v=v, d=d).check(1e-10, seed=seed)


def test_all_words_are_kept_without_probabilities() -> None:
    text = Text([21, 9])
    text.check(1e-10, keep=None)
    for x, y in zip(text.trained(keep=None), text.trained(keep=torch.ones(13)), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(text.trained(keep=torch.zeros(13)), (text.u, text.v), strict=True):
        assert torch.equal(x, y)


def test_one_result_at_every_thread_count() -> None:
    """Enough for three threads; several blocks of centre words, whose pairs one thread draws ahead."""
    text = Text([400, 1300, 3, 0, 800], v=90, d=20, dtype=F32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((*text.trained(), *text.trained(hogwild=threads == 1)))
    torch.set_num_threads(before)
    for result in results:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


def test_one_hogwild_thread_is_the_original() -> None:
    text = Text([17, 0, 1, 2, 23])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for x, y in zip(text.trained(hogwild=True), text.written_out(), strict=True):
        torch.testing.assert_close(x, torch.from_numpy(y), rtol=0, atol=1e-10)
    torch.set_num_threads(before)


def test_hogwild_learns_the_same_on_the_whole() -> None:
    """Not the same bits: pairs meet in another order. How far both have moved, and where to, is alike.

    The furthest that order goes is the second half of the text before the first: cosines of 0.79 and 0.76 here.
    """
    text = Text([300] * 20, v=50, d=20, dtype=F32)
    text.v.zero_()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    exact, free = text.trained(), text.trained(hogwild=True)
    torch.set_num_threads(before)
    for x, y, start in zip(exact, free, (text.u, text.v), strict=True):
        a, b = (x - start).flatten(), (y - start).flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.7 and 0.8 < a.norm() / b.norm() < 1.25


def test_int32_tokens_parameters_and_strides() -> None:
    text = Text([30])
    expected = text.trained()
    text.tokens = text.tokens.int()
    for x, y in zip(text.trained(), expected, strict=True):
        assert torch.equal(x, y)
    wide = torch.stack((text.tokens, text.tokens), 1)
    text.tokens = wide[:, 0]
    text.keep = torch.stack((text.keep, text.keep), 1)[:, 0]
    u, v = torch.nn.Parameter(text.u.clone()), torch.nn.Parameter(text.v.clone())
    skipgram_update_(u, v, text.tokens, text.offsets, 0.05, text.table, keep=text.keep, seed=7)
    assert torch.equal(u, expected[0]) and torch.equal(v, expected[1])


def test_autograd_notices_the_write() -> None:
    text = Text([30])
    u = text.u.clone().requires_grad_()
    loss = u.square().sum()
    skipgram_update_(u, text.v, text.tokens, text.offsets, 0.05, text.table, seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_generator_gives_the_seed() -> None:
    text = Text([30])
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(4)))
    first = text.trained(seed=None, generator=torch.Generator().manual_seed(4))
    for x, y in zip(first, text.trained(seed=seed), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(text.trained(seed=1)[0], text.trained(seed=2)[0])


def test_nan_spreads_and_large_scores_do_not_overflow() -> None:
    text = Text([40], dtype=F32)
    text.u *= 1e4
    text.v *= 1e4
    assert all(x.isfinite().all() for x in text.trained(lr=1e-6))
    text.u[0, 0] = float("nan")
    assert all(x.isnan().any() for x in text.trained())


def test_pairs_follow_their_probabilities() -> None:
    """Words kept, widths and draws: chi-square against what they promise, at 5 standard deviations."""
    torch.manual_seed(2)
    text = Text([500] * 40, v=6)
    pairs = reference.training_pairs(text.tokens, text.offsets, text.table, text.keep, torch.tensor(11), 4, 3)
    share = text.weights**0.75 / (text.weights**0.75).sum()
    count = pairs.negatives.numel()
    chi = ((pairs.negatives.flatten().bincount(minlength=6) - count * share).square() / (count * share)).sum()
    assert chi < 5 + 5 * math.sqrt(2 * 5)
    kept = (text.keep[text.tokens]).sum().item()
    # a centre has 2 E[width] = window + 1 contexts, fewer near the ends of its sentence
    assert len(pairs.inputs) == pytest.approx(kept * 5, rel=0.02)


def test_opcheck() -> None:
    for dtype, keep in ((F32, False), (F64, True)):
        text = Text([9, 3], dtype=dtype)
        options = (text.keep if keep else None, torch.tensor(3), 0.1, 2, 3, keep)
        torch.library.opcheck(_update_, (text.u, text.v, text.tokens, text.offsets, *text.table, *options))


@pytest.mark.parametrize("keep", [True, False])
def test_the_reference_does_what_the_kernel_does(keep: bool, fallback: Any) -> None:
    text = Text([17, 0, 1, 2, 23])
    options = (text.keep if keep else None, torch.tensor(3), 0.1, 4, 5, False)
    tables = [[x.clone() for x in (text.u, text.v)] for _ in range(2)]
    for (u, v), call in zip(tables, (_update_, lambda *a: fallback(_update_, *a)), strict=True):
        call(u, v, text.tokens, text.offsets, *text.table, *options)
    torch.testing.assert_close(*tables, rtol=0, atol=1e-12)


def test_compiles_without_graph_break() -> None:
    torch.compiler.reset()
    text = Text([17, 4])
    expected = text.trained()

    def step(u: Tensor, v: Tensor, tokens: Tensor, offsets: Tensor, threshold: Tensor, alias: Tensor) -> None:
        skipgram_update_(u, v, tokens, offsets, 0.05, AliasTable(threshold, alias), keep=text.keep, seed=7)

    u, v = text.u.clone(), text.v.clone()
    torch.compile(step, fullgraph=True, backend="aot_eager")(u, v, text.tokens, text.offsets, *text.table)
    assert torch.equal(u, expected[0]) and torch.equal(v, expected[1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved only where it is touched")
def test_offsets_beyond_32_bits() -> None:
    v = d = 2**16 + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    tables = [torch.frombuffer(mmap.mmap(-1, 4 * v * d, flags=flags), dtype=F32).view(v, d) for _ in range(2)]
    used = torch.tensor([0, v // 2, v - 1])
    text = Text([4], v=3, d=d, dtype=F32)
    for table, few in zip(tables, (text.u, text.v)):
        table[used] = 0.1 * few
    weights = torch.zeros(v).index_fill(0, used, 1.0)
    text.tokens, text.table, text.keep = used[text.tokens], alias_table(weights), torch.ones(v)
    expected = [x[used].double() for x in tables]
    pairs = reference.training_pairs(text.tokens, text.offsets, text.table, None, torch.tensor(7), 2, 2)
    order = {word: i for i, word in enumerate(used.tolist())}
    ids = [torch.tensor([order[word] for word in x.flatten().tolist()]).view(x.shape) for x in pairs]
    for context, centre, draws in zip(*(x.tolist() for x in ids), strict=True):
        step = 0.0
        for k, row in enumerate([centre, *(n for n in draws if n != centre)]):
            g = 0.05 * (float(k == 0) - torch.sigmoid(expected[0][context] @ expected[1][row]))
            step = step + g * expected[1][row]
            expected[1][row] += g * expected[0][context]
        expected[0][context] += step
    skipgram_update_(*tables, text.tokens, text.offsets, 0.05, text.table, window=2, negatives=2, seed=7)
    for table, exact in zip(tables, expected):
        torch.testing.assert_close(table[used].double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"tokens": torch.tensor([0, 13])}, ValueError, r"tokens must be in \[0, 13\), got 13"),
        ({"tokens": torch.tensor([-1, 0])}, ValueError, r"tokens must be in \[0, 13\), got -1"),
        ({"tokens": torch.zeros(2)}, TypeError, "tokens must be one of torch.int64, torch.int32, got torch.float32"),
        ({"tokens": torch.zeros(2, 1).long()}, ValueError, r"tokens must have shape \(T,\), got \(2, 1\)"),
        ({"offsets": torch.tensor([0, 1])}, ValueError, r"offsets must rise from 0 to 2, got \[0, 1\]"),
        ({"offsets": torch.tensor([0, 2, 1, 2])}, ValueError, "offsets must rise from 0 to 2"),
        ({"offsets": torch.tensor([1, 2])}, ValueError, "offsets must rise from 0 to 2"),
        ({"offsets": torch.zeros(0).long()}, ValueError, r"offsets must have shape \(S\+1,\), got \(0,\)"),
        ({"offsets": torch.tensor([0, 2]).int()}, TypeError, "offsets must be one of torch.int64, got torch.int32"),
        ({"input_weight": torch.zeros(13, 4).half()}, TypeError, "input_weight must be float32 or float64.*float16"),
        ({"output_weight": torch.zeros(13, 4).double()}, TypeError, "output_weight must be float32 or.*float64"),
        ({"output_weight": torch.zeros(12, 4)}, ValueError, r"output_weight must have shape \(13, 4\), got \(12, 4\)"),
        ({"output_weight": torch.zeros(4, 13).t()}, ValueError, "output_weight must be contiguous, got strides"),
        ({"keep": torch.ones(12)}, ValueError, r"keep must have shape \(13,\), got \(12,\)"),
        ({"keep": torch.ones(13).double()}, TypeError, "keep must be one of torch.float32, got torch.float64"),
        ({"table": alias_table(torch.ones(12))}, ValueError, r"table.threshold must have shape \(13,\)"),
        ({"table": (torch.zeros(13), torch.zeros(13))}, TypeError, "table must be an AliasTable.*got tuple"),
        ({"table": AliasTable(torch.zeros(13).long(), torch.full((13,), 13))}, ValueError, r"table.alias must be in"),
        ({"window": 0}, ValueError, "window must be in"),
        ({"negatives": -1}, ValueError, "negatives must be in"),
        ({"lr": -0.1}, ValueError, "lr must be in"),
        ({"lr": float("nan")}, ValueError, "lr must be in"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a number, got Tensor"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "expected one of seed and generator, got both"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {
        "input_weight": torch.zeros(13, 4),
        "output_weight": torch.ones(13, 4),
        "tokens": torch.tensor([0, 1]),
        "offsets": torch.tensor([0, 2]),
        "lr": 0.1,
        "table": alias_table(torch.ones(13)),
    }
    arguments.update(changes)
    before = [arguments[name].clone() for name in ("input_weight", "output_weight")]
    with pytest.raises(error, match=match):
        skipgram_update_(**arguments)
    for name, x in zip(("input_weight", "output_weight"), before):
        assert torch.equal(arguments[name], x)


def test_tables_in_one_place_are_refused() -> None:
    memory = torch.zeros(25, 4)
    text = (torch.tensor([0, 1]), torch.tensor([0, 2]), 0.1, alias_table(torch.ones(13)))
    for u, v in ((memory[:13], memory[:13]), (memory[:13], memory[12:]), (memory[12:], memory[:13])):
        with pytest.raises(ValueError, match="output_weight overlaps input_weight in memory"):
            skipgram_update_(u, v, *text)


def test_compiled_text_is_checked_by_the_kernel() -> None:
    text = Text([2])
    u, v = text.u.clone(), text.v.clone()
    options = (None, torch.tensor(0), 0.1, 5, 5, False)
    for tokens, offsets, alias in (
        (torch.tensor([0, 13]), text.offsets, text.table.alias),
        (torch.tensor([0, -1]).int(), text.offsets, text.table.alias),
        (text.tokens, torch.tensor([0, 3]), text.table.alias),
        (text.tokens, torch.tensor([2, 0]), text.table.alias),
        (text.tokens, torch.tensor([1, 2]), text.table.alias),
        (text.tokens, torch.tensor([0, 1]), text.table.alias),
        (text.tokens, text.offsets, text.table.alias + 13),
    ):
        with pytest.raises(RuntimeError, match="skipgram_update_: "):
            _update_(u, v, tokens, offsets, text.table.threshold, alias, *options)
    assert torch.equal(u, text.u) and torch.equal(v, text.v)


# the alias table


def probabilities(table: AliasTable) -> Tensor:
    """What the table promises, from its columns."""
    own = table.threshold.double() / 2**32
    return own.index_add(0, table.alias, 1 - own) / len(own)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60).filter(lambda x: max(x) > 1e-3), st.sampled_from([F32, F64])
)
def test_alias_table_has_the_weights_shares(weights: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(weights, dtype=dtype)
    table = alias_table(x)
    got, expected = probabilities(table), x.double() / x.double().sum()
    assert ((got - expected).abs() <= 2**-31).all()
    assert not got[x == 0].any()
    assert table.alias.min() >= 0 and table.alias.max() < len(x)
    assert table.threshold.min() >= 0 and table.threshold.max() <= 2**32


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([5.0, 1.0, 0.0, 0.1, 3.0, 3.0, 0.0])
    x = alias_table(weights).sample(400, 500, seed=3)
    assert x.shape == (400, 500) and x.dtype == torch.int64
    share = weights / weights.sum()
    counts, used = x.flatten().bincount(minlength=7), share > 0
    assert not counts[~used].any()
    chi = ((counts - x.numel() * share)[used].square() / (x.numel() * share)[used]).sum()
    assert chi < 4 + 5 * math.sqrt(2 * 4)
    assert torch.equal(x, alias_table(weights).sample(400, 500, seed=3))
    assert not torch.equal(x, alias_table(weights).sample(400, 500, generator=torch.Generator().manual_seed(3)))


def test_a_word_without_weight_is_never_drawn_for_rounding() -> None:
    """Shares that do not add up to V in float64 leave columns over: none may become a word of weight 0."""
    for v in (3, 7, 10, 49, 1000):
        weights = torch.rand(v) * 10.0 ** torch.randint(-20, 20, (v,))
        weights[::3] = 0.0
        if weights.sum() > 0:
            assert not probabilities(alias_table(weights))[::3].any()


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        (torch.zeros(3), ValueError, "weights must be finite, not negative and not all 0"),
        (torch.tensor([1.0, -1.0]), ValueError, "weights must be finite, not negative"),
        (torch.tensor([1.0, float("inf")]), ValueError, "weights must be finite"),
        (torch.tensor([1.0, float("nan")]), ValueError, "weights must be finite"),
        (torch.ones(2, 2), ValueError, r"weights must have shape \(V,\)"),
        (torch.ones(0), ValueError, r"weights must have shape \(V,\)"),
        (torch.ones(2).long(), TypeError, "weights must be float32"),
        ([1.0], TypeError, "weights must be a torch.Tensor, got list"),
    ],
)
def test_alias_table_refuses(weights: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        alias_table(weights)
