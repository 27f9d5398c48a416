# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops under torch.compile, torch.export, activation checkpointing and fake tensors of any size."""

from __future__ import annotations

from typing import Any

import contrastive_cases as cases
import pytest
import torch
import torch._dynamo.testing
from contrastive_cases import OPS, POSITIVES
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import Exclude

F32 = torch.float32
ALL = {**OPS, **POSITIVES}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def options_for(name: str, n: int, m: int) -> dict[str, Any]:
    if name == "sampled_logsumexp":
        return {"indices": torch.randint(m, (n, 5)), "mask": torch.rand(n, 5) < 0.9}
    if cases.is_self(ALL[name]):
        return {"exclude": Exclude(diagonal=0, period=n // 2)}
    return {"exclude": Exclude(diagonal=0)}


def problem(name: str, n: int = 20, m: int = 30, d: int = 7) -> tuple[cases.Op, dict[str, Tensor], dict[str, Any]]:
    op = ALL[name]
    m = n if cases.is_self(op) else m
    return op, cases.random_tensors(op, n, m, d, dtypes=[F32]), {**op.options, **options_for(name, n, m)}


def same(first: cases.Result, second: cases.Result) -> None:
    for x, y in zip(first.outputs, second.outputs, strict=True):
        torch.testing.assert_close(x, y)
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(gradient, second.gradients[name])


@pytest.mark.parametrize("name", ALL)
def test_one_graph_with_its_backward(name: str) -> None:
    """fullgraph=True raises at the first graph break; learnable scale and bias, and as numbers."""
    op, tensors, options = problem(name)
    cotangents = cases.cotangents_of(op, tensors, **options)
    compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager")
    same(
        cases.evaluate(compiled, tensors, cotangents, **options),
        cases.evaluate(op.ours, tensors, cotangents, **options),
    )
    explained = torch._dynamo.explain(op.ours)(tensors, **options)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    def with_numbers(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return op.ours({**dict.fromkeys({"scale", "bias"} & set(op.tensors), 0.5), **x}, **options)

    features = {key: x for key, x in tensors.items() if key not in ("scale", "bias")}
    compiled = torch.compile(with_numbers, fullgraph=True, backend="aot_eager")
    same(cases.evaluate(compiled, features, cotangents), cases.evaluate(with_numbers, features, cotangents))


def test_one_graph_of_l2_normalize() -> None:
    x = {"a": torch.randn(5, 3), "b": torch.randn(4, 3)}

    def stacked(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (ops.l2_normalize(x["a"], x["b"]),)

    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    cotangents = [torch.randn(9, 3)]
    same(cases.evaluate(compiled, x, cotangents), cases.evaluate(stacked, x, cotangents))


@pytest.mark.parametrize("name", ["similarity_logsumexp", "self_similarity_logsumexp", "similarity_cross_entropy"])
def test_other_batch_sizes_do_not_compile_again(name: str) -> None:
    """With dynamic shapes one graph serves every batch size on one side of the limit for kept scores."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ALL[name].ours, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (20, 24, 32):
        op, tensors, options = problem(name, n, n)
        cotangents = cases.cotangents_of(op, tensors, **options)
        expected = cases.evaluate(op.ours, tensors, cotangents, **options)
        same(cases.evaluate(compiled, tensors, cotangents, **options), expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_inductor() -> None:
    def step(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        q, k = torch.nn.functional.normalize(q), torch.nn.functional.normalize(k)
        row, col = ops.similarity_logsumexp(q, k, scale.exp(), Exclude(diagonal=0))
        return torch.nn.functional.softplus(row - (q * k).sum(1) * scale.exp()).mean() + col.mean()

    x = [torch.randn(12, 5, requires_grad=True), torch.randn(12, 5, requires_grad=True)]
    x.append(torch.tensor(1.5, requires_grad=True))
    loss, expected = torch.compile(step, fullgraph=True)(*x), step(*x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return ops.similarity_cross_entropy(q, k, (q * k).sum(1), 5.0, exclude=Exclude(diagonal=0))[0]

    q, k = torch.randn(9, 4), torch.randn(9, 4)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Model(), (q, k), dynamic_shapes=({0: rows}, {0: rows}))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.sslkernels.similarity_cross_entropy.default in calls
    for n in (9, 70):
        q, k = torch.randn(n, 4), torch.randn(n, 4)
        torch.testing.assert_close(program.module()(q, k), Model()(q, k))


def test_activation_checkpointing() -> None:
    for name in ALL:
        op, tensors, options = problem(name)
        cotangents = cases.cotangents_of(op, tensors, **options)

        def checkpointed(x: dict[str, Tensor], op: cases.Op = op, **options: Any) -> tuple[Tensor, ...]:
            keys = list(x)
            call = torch.utils.checkpoint.checkpoint
            return call(lambda *values: op.ours(dict(zip(keys, values)), **options), *x.values(), use_reentrant=False)

        same(
            cases.evaluate(checkpointed, tensors, cotangents, **options),
            cases.evaluate(op.ours, tensors, cotangents, **options),
        )


@pytest.mark.parametrize("name", ALL)
def test_a_million_by_a_million(name: str) -> None:
    """Fakes of 2^20 rows: 2^40 pairs, which overflow 32 bits and no memory; forward and backward."""
    op, n = ALL[name], 2**20
    with torch._subclasses.FakeTensorMode():
        tensors = cases.random_tensors(op, n, n, 16, dtypes=[F32])
        x = cases.leaves(tensors, list(tensors))
        options = {**op.options, **options_for(name, n, n)}
        outputs = op.ours(x, **options)
        sum(out.sum() for out in outputs).backward()
        for key, leaf in x.items():
            assert leaf.grad.shape == tensors[key].shape
        largest = max(out.numel() for out in outputs)
    assert largest <= len(cases.SCALES) * n


@pytest.mark.parametrize("name", ALL)
def test_meta_tensors(name: str) -> None:
    op, tensors, options = problem(name)
    real = op.ours(tensors, **options)

    def to_meta(x: Any) -> Any:
        if isinstance(x, Exclude):
            return Exclude(*map(to_meta, x))
        return x.to("meta") if isinstance(x, Tensor) else x

    with torch.no_grad():
        fake = op.ours({k: to_meta(x) for k, x in tensors.items()}, **{k: to_meta(x) for k, x in options.items()})
    for x, y in zip(real, fake):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert y.device.type == "meta"
