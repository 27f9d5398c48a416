# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops in autograd: gradcheck, double backward, opcheck, frozen keys that change, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import contrastive_cases as cases
import pytest
import torch
from contrastive_cases import OPS, POSITIVES
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import Exclude, _contrastive, _contrastive_sums, _emitted

F32, F64 = torch.float32, torch.float64
ALL = {**OPS, **POSITIVES}


def options_for(name: str, n: int, m: int) -> dict[str, Any]:
    if name == "sampled_logsumexp":
        return {"indices": torch.randint(m, (n, 4)), "mask": torch.rand(n, 4) < 0.8}
    weight = {"weight": torch.rand(n)} if name in ("similarity_cross_entropy", "similarity_softplus_sum") else {}
    if name in POSITIVES:
        return {"exclude": Exclude(diagonal=0, period=n // 2 if cases.is_self(ALL[name]) else None)}
    groups = torch.randint(3, (n,)), None if cases.is_self(ALL[name]) else torch.randint(3, (m,))
    return {"exclude": Exclude(0, None, *groups, torch.rand(m) < 0.9), **weight}


def problem(name: str, n: int = 6, m: int = 8, dtype: torch.dtype = F64) -> tuple[cases.Op, dict[str, Tensor], Any]:
    op = ALL[name]
    m = n if cases.is_self(op) else m
    return op, cases.random_tensors(op, n, m, 3, dtypes=[dtype]), {**op.options, **options_for(name, n, m)}


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name: str) -> None:
    op, tensors, options = problem(name)
    x = cases.leaves(tensors, list(tensors))

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        out = op.ours(dict(zip(x, values)), **options)
        return tuple(o.masked_fill(o == -torch.inf, 0.0) for o in out)  # a difference of infinities is NaN

    assert torch.autograd.gradcheck(outputs, tuple(x.values()))


# double backward


@pytest.mark.parametrize("name", ALL)
def test_double_backward_is_refused_by_name(name: str) -> None:
    """Each tensor alone: a gradient penalty on what the op gave would miss a term in silence."""
    op, tensors, options = problem(name)
    for wanted in tensors:
        x = cases.leaves(tensors, [wanted])
        total = sum((out.masked_fill(out == -torch.inf, 0.0) ** 2).sum() for out in op.ours(x, **options))
        (gradient,) = torch.autograd.grad(total, x[wanted], create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"sslkernels::\w+: double backward is not supported; use sslkernels.ref"
        ):
            (gradient**2).sum().backward()


def test_double_backward_of_l2_normalize_is_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad((ops.l2_normalize(x) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="l2_normalize_backward: double backward is not supported"):
        (gradient**2).sum().backward()


@pytest.mark.parametrize("name", ["similarity_cross_entropy", "similarity_softplus_sum"])
def test_one_sweep_ops_inside_a_gradient_penalty(name: str) -> None:
    """The loss is a scalar, so the upstream gradient is a constant: only the saved inputs tell of the missing term."""
    op, tensors, options = problem(name)
    x = cases.leaves(tensors, ["q"])
    loss = op.ours(x, **options)[0]
    (gradient,) = torch.autograd.grad(loss, x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="emitted_gradients: double backward is not supported"):
        (loss + gradient.norm()).backward()


def test_backward_twice_through_one_graph() -> None:
    for name in ALL:
        op, tensors, options = problem(name)
        x = cases.leaves(tensors, list(tensors))
        out = op.ours(x, **options)[0].sum()
        first = torch.autograd.grad(out, list(x.values()), retain_graph=True)
        second = torch.autograd.grad(out, list(x.values()))
        assert all(map(torch.equal, first, second)), name


def test_no_graph_without_gradients() -> None:
    for name in ALL:
        op, tensors, options = problem(name)
        x = cases.leaves(tensors, list(tensors))
        with torch.no_grad():
            assert not any(out.requires_grad for out in op.ours(x, **options)), name
        with torch.inference_mode():
            op.ours(tensors, **options)


# opcheck


def exclude_arguments() -> tuple[Any, ...]:
    return Exclude(0, None, torch.randint(3, (5,)), torch.randint(3, (7,)), torch.rand(7) < 0.9, False)


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each op: with gradients and without, scale tensor and number, every rule and none, 16 bits too."""
    q, k, z = torch.randn(5, 3), torch.randn(7, 3), torch.randn(6, 3)
    narrow, narrow_z = q.bfloat16(), z.half()
    qg, kg, zg = (x.clone().requires_grad_() for x in (q, k, z))
    scale, bias, positive = torch.tensor([0.7], dtype=F64), torch.tensor([-1.0], dtype=F64), torch.randn(5)
    number, tensor, learnt = (None, 0.7), (scale, 1.0), (scale.clone().requires_grad_(), 1.0)
    biased = (bias.clone().requires_grad_(), 0.0)
    rules, no_rules = exclude_arguments(), (None,) * 5 + (False,)
    own, no_own = (0, 3, torch.randint(3, (6,)), torch.rand(6) < 0.9, False), (None,) * 4 + (False,)
    one, two = (1.0,), (1.0, 0.5)
    op = torch.ops.sslkernels
    lse, positives, self_lse = op.similarity_logsumexp, (0,), op.self_similarity_logsumexp
    kept = lse(q, k, *number, *rules, two, True, True, 0)
    alone = lse(q, k, *number, *no_rules, one, False, False, None)
    self_kept, self_alone = self_lse(z, *number, *own, two, True, 3), self_lse(z, *number, *no_own, one, False, None)
    context = op.similarity_row_attention(q, k, *number, *rules)[2]
    indices, counts = torch.randint(7, (5, 4)), torch.rand(5, 4) < 0.8
    sampled = op.sampled_logsumexp(q, k, indices, counts, *number)
    x, norm = op.l2_normalize([q, k], 1e-12)
    row, col = torch.randn(2, 5), torch.randn(2, 7)
    return {
        "similarity_logsumexp": [
            (qg, kg, *learnt, *rules, two, True, True, *positives),
            (qg.detach().bfloat16().requires_grad_(), k, *number, *no_rules, one, False, False, None),
        ],
        "similarity_logsumexp_backward": [
            (row, col, positive, q, k, *tensor, *rules, two, 0, kept[0], kept[1], kept[4], [True] * 3),
            (row[:1], None, None, narrow, k, *number, *no_rules, one, None, *alone[:2], alone[4], [True, False, False]),
            (None, None, positive, q, k, *number, *no_rules, one, 0, alone[0], alone[1], alone[4], [False, True, True]),
        ],
        "self_similarity_logsumexp": [
            (zg, *learnt, *own, two, True, 3),
            (narrow_z, *number, *no_own, one, False, None),
        ],
        "self_similarity_logsumexp_backward": [
            (torch.randn(2, 6), torch.randn(6), z, *tensor, *own, two, 3, self_kept[0], self_kept[3], [True, True]),
            (
                torch.randn(1, 6),
                None,
                narrow_z,
                *number,
                *no_own,
                one,
                None,
                self_alone[0],
                self_alone[3],
                [True, False],
            ),
        ],
        "similarity_row_attention": [(qg, k, *learnt, *rules), (qg, k.double(), *number, *no_rules)],
        "similarity_row_attention_backward": [
            (positive, q, context, *tensor, [True, True]),
            (positive, narrow, context, *number, [True, False]),
        ],
        "similarity_cross_entropy": [
            (qg, kg, positive.clone().requires_grad_(), torch.rand(5), 1.0, *learnt, *rules, False, [True] * 4),
            (narrow.clone().requires_grad_(), k, positive, None, 0.2, *number, *no_rules, True, [True] + [False] * 3),
            (
                q,
                k,
                positive.double(),
                torch.rand(5).double(),
                1.0,
                *number,
                *no_rules,
                False,
                [False, True, True, False],
            ),
        ],
        "two_view_cross_entropy": [
            (zg, z, torch.rand(12).double(), 1.0, *learnt, False, [True, False, True]),
            (z.bfloat16(), z.bfloat16(), None, 0.2, *number, True, [False] * 3),
        ],
        "emitted_gradients": [(torch.tensor(2.0), [q, k], [q.bfloat16(), k])],
        "similarity_softplus": [
            (qg, kg, *learnt, *biased, *rules),
            (narrow, k.bfloat16(), *number, None, -1.0, *no_rules),
        ],
        "similarity_softplus_backward": [
            (positive, q, k, *tensor, bias, 0.0, *rules, [True] * 4),
            (positive, q, k.half(), *number, None, -1.0, *no_rules, [False, True, False, False]),
        ],
        "similarity_softplus_sum": [
            (qg, kg, torch.rand(5), 1.0, *learnt, *biased, *rules, [True] * 4),
            (narrow, kg, None, 0.2, *number, None, -1.0, *no_rules, [False, True, False, False]),
        ],
        "sampled_logsumexp": [(qg, kg, indices, counts, *learnt), (narrow, k.half(), indices, None, *number)],
        "sampled_logsumexp_backward": [
            (positive, q, k, indices, counts, *tensor, sampled, [True] * 3),
            (positive, narrow, k, indices, None, *number, sampled, [True, False, True]),
        ],
        "l2_normalize": [([qg, kg], 1e-12), ([q.bfloat16()], 1e-12)],
        "l2_normalize_backward": [(torch.randn(12, 3), x, norm, 1e-12)],
    }


FILES = (_contrastive, _contrastive_sums, _emitted)
CONTRASTIVE = [x._opname for file in FILES for x in vars(file).values() if isinstance(x, torch._ops.OpOverload)]


def test_every_op_has_samples() -> None:
    assert set(samples()) == set(CONTRASTIVE)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_opcheck(name: str) -> None:
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.sslkernels, name).default, arguments)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_reference_has_the_shapes_and_dtypes_of_the_kernel(name: str) -> None:
    """It takes the same arguments where no kernel serves; opcheck holds the kernel against the fake."""
    op = getattr(torch.ops.sslkernels, name).default
    for arguments in samples()[name]:
        with torch.no_grad():
            got = op(*arguments)
            want = op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *arguments)
        got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if "scores" not in str(op._schema.returns):  # below the diagonal of a kept symmetric matrix nothing is defined
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# frozen keys


def attention(q: Tensor, k: Tensor) -> Tensor:
    return ops.similarity_logsumexp(q, k, 2.0, columns=False)[0].sum()


def cross_entropy(q: Tensor, k: Tensor) -> Tensor:
    positive = (q * q.detach().flip(0)).sum(1)
    return ops.similarity_cross_entropy(q, k, positive, 2.0, weight=0.1, exclude=Exclude(diagonal=0))[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", [attention, cross_entropy])
def test_frozen_keys_may_change_before_backward(loss: Callable[..., Tensor], compiled: bool) -> None:
    """A queue is overwritten between forward and backward: nothing raises, and the gradient is that of the old keys."""
    queue, features = torch.randn(70, 5), torch.randn(9, 5)
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    q = features.clone().requires_grad_()
    expected = torch.autograd.grad(loss(q, queue.clone()), q)[0]
    value = call(q, queue)
    queue[3:40] = torch.nan
    value.backward()
    torch.testing.assert_close(q.grad, expected)


def test_keys_with_gradient_may_not_change_before_backward() -> None:
    queue = torch.randn(70, 5).requires_grad_()
    value = ops.similarity_logsumexp(torch.randn(9, 5), queue)[0].sum()
    with torch.no_grad():
        queue[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_autocast_casts_features_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    op, tensors, options = problem(name, 20, 30, dtype=F32)
    tensors |= {key: tensors[key] / 3 for key in ("scale", "bias", "positive") if key in tensors}  # no 16-bit numbers
    rounded = {key: x.to(dtype) if key in ("q", "k") else x for key, x in tensors.items()}
    cotangents = cases.cotangents_of(op, tensors, **options)
    with torch.autocast("cpu", dtype):
        result = cases.evaluate(op.ours, tensors, cotangents, **options)
        alone = cases.evaluate(op.ours, tensors, cotangents, **options, autocast=False)
    plain = cases.evaluate(op.ours, tensors, cotangents, **options)
    narrow = cases.evaluate(op.ours, rounded, cotangents, **options)
    for i, out in enumerate(result.outputs):
        assert out.dtype == F32
        assert torch.equal(out, narrow.outputs[i])
        assert torch.equal(alone.outputs[i], plain.outputs[i])
    for key, gradient in result.gradients.items():
        assert gradient.dtype == F32
        assert torch.equal(gradient, narrow.gradients[key].to(F32)), key
        assert torch.equal(alone.gradients[key], plain.gradients[key]), key


def test_autocast_leaves_float64_alone() -> None:
    q = torch.randn(5, 3, dtype=F64)
    with torch.autocast("cpu", torch.bfloat16):
        row, _ = ops.similarity_logsumexp(q, q)
    torch.testing.assert_close(row, torch.logsumexp(q @ q.T, 1))


def test_emitted_gradients_add_up_over_backwards() -> None:
    """An upstream gradient of one is handed on without a copy: nothing may accumulate into what the node has saved."""
    torch.manual_seed(0)
    q = torch.randn(5, 3, requires_grad=True)
    k = torch.randn(7, 3, requires_grad=True)
    loss = ops.similarity_cross_entropy(q, k, torch.randn(5), 2.0)[0]
    once = torch.autograd.grad(loss, (q, k), retain_graph=True)
    first = [g.clone() for g in once]
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for x, g in zip((q, k), first):
            torch.testing.assert_close(x.grad, times * g)
    (3 * loss).backward()
    for x, g in zip((q, k), first):
        torch.testing.assert_close(x.grad, 6 * g)
