# SPDX-License-Identifier: Apache-2.0
"""The searches in the dispatcher and the compiler, by threads and instruction sets; what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from neighbors_cases import METRICS, assert_best
from torch import Tensor

from sslkernels import _library, ops, reference

NAMES = ("nearest", "topk_similarity")
built = pytest.mark.skipif("cpu" in _library.PROBLEMS, reason="the CPU library is not built")


def samples(name: str) -> list[tuple[Any, ...]]:
    """Every metric, keys or none, 16 bits, and inputs that require a gradient."""
    k = () if name == "nearest" else (3,)
    keys = torch.randn(9, 5)
    return [
        (torch.randn(7, 5, requires_grad=True), keys, *k, "l2", False),
        (torch.randn(7, 5).bfloat16(), keys.double(), *k, "dot", True),
        (torch.randn(7, 5).half(), None, *k, "cosine", True),
        (torch.randn(300, 5), None, *k, "l2", True),
        (torch.randn(0, 5), keys, *k, "dot", False),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    for arguments in samples(name):
        torch.library.opcheck(getattr(torch.ops.sslkernels, name).default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_what_the_kernel_gives(name: str) -> None:
    op = getattr(torch.ops.sslkernels, name).default
    keys = torch.randn(40, 5)
    keys[3, 2], keys[17, 0], keys[30] = torch.nan, torch.inf, 1e30
    spoiled = [(torch.randn(12, 5), keys, *(() if name == "nearest" else (40,)), m, False) for m in ("l2", "dot")]
    for arguments in [*samples(name), *spoiled]:
        fallback = getattr(reference.neighbors, name)(*arguments)
        with torch.no_grad():
            got = op(*arguments)
        for x, y in zip(got, fallback, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        torch.testing.assert_close(got, fallback, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.neighbors, "BLOCK", 500)
    queries = torch.randn(120, 8)
    for metric in METRICS:
        options = {"metric": metric, "exclude_self": True}
        k = () if name == "nearest" else (5,)
        assert_best(getattr(reference.neighbors, name)(queries, None, *k, **options), queries, None, **options)


def test_no_gradient() -> None:
    queries = torch.randn(6, 4, requires_grad=True)
    for result in (ops.nearest(queries), ops.topk_similarity(queries, queries * 2, 2)):
        assert not any(x.requires_grad for x in result)
    (queries.sum() + ops.nearest(queries, metric="dot")[0].sum()).backward()
    assert queries.grad is not None and (queries.grad == 1).all()


def test_autocast_casts_nothing() -> None:
    """bfloat16 could not tell these keys apart."""
    keys = 1 + torch.arange(64.0)[:, None] * 1e-4
    expected = ops.topk_similarity(keys, None, 3, metric="l2"), reference.neighbors.nearest(keys, None, "dot")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.topk_similarity(keys, None, 3, metric="l2"), reference.neighbors.nearest(keys, None, "dot")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def search(queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    chosen = ops.nearest(2 * queries, keys)
    return *chosen, *ops.topk_similarity(keys, None, 4, metric="cosine", exclude_self=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(search, fullgraph=True, backend=backend, dynamic=True)
    for n, m in ((7, 11), (20, 30)):
        queries, keys = torch.randn(n, 6), torch.randn(m, 6)
        torch.testing.assert_close(compiled(queries, keys), search(queries, keys))


def test_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            return search(queries, keys)

    arguments = torch.randn(7, 6), torch.randn(11, 6)
    torch.testing.assert_close(torch.export.export(Module(), arguments).module()(*arguments), search(*arguments))


# how the kernel cuts its work


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(3, 40000), (600, 900), (6000, 30), (1100, None)], ids=str)
def test_threads(shape: tuple[int, int | None], metric: str, threads: int) -> None:
    """Rows or ranges of keys for each thread, and tiles of the symmetric sweep: right, and the same bits again."""
    n, m = shape
    queries, keys = torch.randn(n, 24), None if m is None else torch.randn(m, 24)
    exclude_self = m is None or n <= m
    options = {"metric": metric, "exclude_self": exclude_self}
    first = ops.nearest(queries, keys, **options), ops.topk_similarity(queries, keys, 20, **options)
    again = ops.nearest(queries, keys, **options), ops.topk_similarity(queries, keys, 20, **options)
    for one, other in zip(first, again):
        assert_best(one, queries, keys, **options)
        assert all(torch.equal(x, y) for x, y in zip(one, other))


def test_one_thread_finds_what_two_find() -> None:
    queries, keys = torch.randn(500, 40), torch.randn(3000, 40)
    found = []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append((*ops.nearest(queries, keys), *ops.nearest(keys, exclude_self=True)))
        found[-1] += ops.topk_similarity(queries[:2], keys, 30)
    torch.set_num_threads(before)
    torch.testing.assert_close(*found)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_each_instruction_set(metric: str, dtype: torch.dtype, level: int) -> None:
    queries, keys = torch.randn(280, 19).to(dtype), torch.randn(530, 19).to(dtype)
    for other in (keys, None):
        options = {"metric": metric, "exclude_self": True}
        assert_best(ops.nearest(queries, other, **options), queries, other, **options)
        assert_best(ops.topk_similarity(queries, other, 7, **options), queries, other, **options)
    keys[100, 3] = torch.nan
    assert (ops.nearest(queries, keys, metric=metric)[1] == 100).all()
    assert (ops.nearest(keys, metric=metric, exclude_self=True)[1][101:] == 100).all()


@built
def test_no_matrix_of_scores() -> None:
    """12,000 x 12,000 scores would be 576 MB, 2,000 x 10,000 candidates with their indices 320 MB."""
    import resource

    x = torch.randn(12000, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ops.nearest(x, exclude_self=True)
    ops.topk_similarity(x, None, 20, exclude_self=True)
    ops.topk_similarity(x[:2000], x, 500)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# what is refused

X = torch.randn(4, 3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "queries of rank 1": ({"queries": X[0]}, ValueError, "queries must be 2-D (rows, features), got shape (3,)"),
    "queries no tensor": ({"queries": [1.0]}, TypeError, "queries must be a torch.Tensor, got list"),
    "integers": ({"keys": X.int()}, TypeError, "keys must have a floating dtype, got torch.int32"),
    "another width": ({"keys": X[:, :2]}, ValueError, "keys must have as many features as queries (3), got shape"),
    "another device": ({"keys": X.to("meta")}, ValueError, "keys must be on the device of queries (cpu), got meta"),
    "metric": ({"metric": "l1"}, ValueError, "metric must be one of 'l2', 'dot', 'cosine', got 'l1'"),
    "no key": ({"keys": X[:0]}, ValueError, "keys must have at least one row, got 0 rows"),
    "no other key": (
        {"queries": X[:1], "keys": None, "exclude_self": True},
        ValueError,
        "queries must have at least one row beside the query itself, got 1 row",
    ),
    "fewer keys than queries": (
        {"keys": X[:3], "exclude_self": True},
        ValueError,
        "queries must be the first rows of keys (3) for exclude_self, got 4 rows",
    ),
}
REFUSED_K: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k of zero": ({"k": 0}, ValueError, "k must be at least 1, got 0"),
    "k a float": ({"k": 2.0}, TypeError, "k must be an integer, got float"),
    "k above the keys": ({"k": 5}, ValueError, "k must be at most the 4 keys of a query, got 5"),
    "k above the others": ({"k": 4, "exclude_self": True}, ValueError, "k must be at most the 3 keys of a query"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changed, error, message = REFUSED[name]
    arguments = {"queries": X, "keys": X, **changed}
    with pytest.raises(error, match=re.escape(message)):
        ops.nearest(arguments.pop("queries"), arguments.pop("keys"), **arguments)
    arguments = {"queries": X, "keys": X, **changed}
    with pytest.raises(error, match=re.escape(message)):
        ops.topk_similarity(arguments.pop("queries"), arguments.pop("keys"), 1, **arguments)


@pytest.mark.parametrize("name", REFUSED_K)
def test_refused_k(name: str) -> None:
    changed, error, message = REFUSED_K[name]
    with pytest.raises(error, match=re.escape(message)):
        ops.topk_similarity(X, X, **changed)
