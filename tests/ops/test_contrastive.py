# SPDX-License-Identifier: Apache-2.0
"""The contrastive ops against their definitions in float64: shapes, exclusions, dtypes, strides, needed gradients."""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import contrastive_cases as cases
import pytest
import torch
from contrastive_cases import OPS, POSITIVES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import Exclude
from sslkernels.reference import contrastive as reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# empty, one, primes; vector widths 8 and 16, panels of 64, 128 and 256 rows and tiles of 128 and 512 keys, each +- 1
SIZES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513]
WIDTHS = [0, 1, 2, 3, 8, 17, 33, 64]
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16), (F64, BF16), (F16, F64)]
EXAMPLES = settings(max_examples=30, deadline=None)
RULES = {
    "nothing": lambda n, m: Exclude(),
    "diagonal": lambda n, m: Exclude(diagonal=0),
    "diagonal above": lambda n, m: Exclude(diagonal=5),
    "diagonal below": lambda n, m: Exclude(diagonal=-3),
    "diagonal outside": lambda n, m: Exclude(diagonal=2**40),
    "period": lambda n, m: Exclude(diagonal=0, period=7),
    "period of one": lambda n, m: Exclude(diagonal=3, period=1),  # everything
    "period beyond": lambda n, m: Exclude(diagonal=-3, period=2**40),
    "groups": lambda n, m: Exclude(query_groups=labels(n, 4), key_groups=labels(m, 4)),
    "other groups": lambda n, m: Exclude(query_groups=labels(n, 4), key_groups=labels(m, 4), differ=True),
    "one group": lambda n, m: Exclude(query_groups=labels(n, 1), key_groups=labels(m, 1)),  # everything
    "key mask": lambda n, m: Exclude(key_mask=torch.rand(m) < 0.7),
    "no key": lambda n, m: Exclude(key_mask=torch.zeros(m, dtype=torch.bool)),
    "all": lambda n, m: Exclude(1, 9, labels(n, 9), labels(m, 9), torch.rand(m) < 0.7, True),
}


def labels(count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,))


def restrict(op: cases.Op, exclude: Exclude) -> Exclude:
    """The rule as a self-similarity takes it: symmetric, one vector of groups."""
    if not cases.is_self(op):
        return exclude
    return exclude._replace(diagonal=None if exclude.diagonal is None else 0, key_groups=None)


def samples(n: int, m: int, count: int) -> dict[str, Any]:
    """Options of sampled_logsumexp."""
    return {"indices": torch.randint(max(m, 1), (n, count if m else 0)), "mask": torch.rand(n, count if m else 0) < 0.8}


def options_for(name: str, n: int, m: int, exclude: Exclude, count: int = 9) -> dict[str, Any]:
    if name == "sampled_logsumexp":
        return samples(n, m, count)
    weight = {"weight": torch.rand(n) + 0.5} if name in ("similarity_cross_entropy", "similarity_softplus_sum") else {}
    return {"exclude": restrict(OPS[name], exclude), **weight}


@st.composite
def exclusions(draw: Any, n: int, m: int) -> Exclude:
    diagonal = draw(st.none() | st.sampled_from([0, 1, -1, m - n, m // 2, -n, 2**33, -(2**33)]))
    period = None if diagonal is None else draw(st.none() | st.integers(1, m + 2))
    # equal and next to each other, on both sides of zero, and farther apart than 31 and 32 bits hold
    values = draw(st.sampled_from([None, [7], [0, 1, -1], [-5, 2**31 + 5], [-(2**62), 2**62, 2**62 + 1, 0]]))
    groups = [None if values is None else torch.tensor(values)[labels(count, len(values))] for count in (n, m)]
    mask = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    key_mask = None if mask is None else torch.rand(m) < mask
    return Exclude(diagonal, period, *groups, key_mask, draw(st.booleans()))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (one row repeated for "expanded") in other memory; what lies between them is NaN."""
    n, d = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(n, d) if n else x
    room = x.new_full((2 * n + 1, 2 * d + 3), torch.nan)
    view = {
        "dense": lambda: x.new_empty(n, d),
        "sliced columns": lambda: room[:n, 2 : 2 + d],
        "every other row": lambda: room[1::2, :d],
        "every other column": lambda: room[:n, 1 : 1 + 2 * d : 2],
    }[layout]()
    view.copy_(x)
    return view


LAYOUTS = ["dense", "transposed", "sliced columns", "every other row", "every other column", "expanded"]


@pytest.mark.parametrize("name", OPS)
@EXAMPLES
@given(data=st.data())
def test_against_the_definition(name: str, data: st.DataObject) -> None:
    op = OPS[name]
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    n, m, d = (data.draw(st.sampled_from(sizes), label="size") for sizes in (SIZES, SIZES, WIDTHS))
    m = n if cases.is_self(op) else m
    dtypes = data.draw(st.sampled_from(DTYPES), label="dtypes")
    tensors = cases.random_tensors(op, n, m, d, scale=data.draw(st.sampled_from([1.0, 5.0, -2.0])), dtypes=dtypes)
    for feature in ("q", "k"):
        if feature in tensors:
            tensors[feature] = laid_out(tensors[feature], data.draw(st.sampled_from(LAYOUTS), label="layout"))
    exclude = data.draw(exclusions(n, m), label="exclude")
    cases.check(
        op, tensors, positive=True, **options_for(name, n, m, exclude, data.draw(st.sampled_from([0, 1, 5, 33])))
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name in OPS if name != "sampled_logsumexp"])
def test_exclusions(name: str, rule: str) -> None:
    """Three tiles of keys and two panels of queries in the general op, tiles of 128 keys where groups must be equal."""
    op, n, m = OPS[name], 131, 1030
    m = n if cases.is_self(op) else m
    tensors = cases.random_tensors(op, n, m, 5, dtypes=[F32])
    cases.check(op, tensors, **options_for(name, n, m, RULES[rule](n, m)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("of_self", [False, True], ids=["two sets", "self"])
def test_the_excluded_pairs_of_the_reference(rule: str, of_self: bool) -> None:
    n, m = 23, 23 if of_self else 31
    exclude = RULES[rule](n, m)
    exclude = restrict(OPS["self_similarity_logsumexp"], exclude) if of_self else exclude
    assert torch.equal(cases.reference_excluded(n, m, exclude, of_self), cases.excluded(n, m, exclude, of_self))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("rule", ["nothing", "all"])
def test_the_reference_is_the_definition(name: str, rule: str) -> None:
    op, n, m = OPS[name], 12, 12
    tensors = cases.random_tensors(op, n, m, 5, dtypes=[F64])
    options = {**op.options, **options_for(name, n, m, RULES[rule](n, m))}
    cotangents = cases.cotangents_of(op, tensors, **options)
    result = cases.evaluate(op.reference, tensors, cotangents, **options)
    cases.assert_stable(result, cases.truth(op, tensors, cotangents, **options), F64, tensors)


@pytest.mark.parametrize("shape", [(1, 1), (17, 17), (65, 130), (300, 700)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (BF16, F16)], ids=str)
@pytest.mark.parametrize("name", POSITIVES)
def test_positives(name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int], threads: int) -> None:
    op, (n, m) = POSITIVES[name], shape
    if cases.is_self(op):
        n, exclude = 2 * n, Exclude(diagonal=0, period=n)
    else:
        exclude = Exclude(diagonal=m - n)
    tensors = cases.random_tensors(op, n, m, 33, dtypes=dtypes)
    cases.check(op, tensors, exclude=exclude)


@pytest.mark.parametrize("name", POSITIVES)
def test_positives_alone(name: str) -> None:
    """The other outputs are not used: their gradients are absent, not zero."""
    op = POSITIVES[name]
    tensors = cases.random_tensors(op, 20, 20, 7, dtypes=[F64])
    exclude = Exclude(diagonal=0, period=10) if cases.is_self(op) else Exclude(diagonal=0)
    x = cases.leaves(tensors, list(tensors))
    cotangent = torch.randn(20, dtype=F64)
    got = torch.autograd.grad(op.ours(x, exclude=exclude)[-1], list(x.values()), cotangent)
    want = torch.autograd.grad(op.reference(x, exclude=exclude)[-1], list(x.values()), cotangent)
    torch.testing.assert_close(got, want)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, count) for count in range(len(names) + 1)))


NEEDS = [(name, wanted) for name, op in {**OPS, **POSITIVES}.items() for wanted in subsets(op.tensors)]


@pytest.mark.parametrize(("name", "wanted"), NEEDS, ids=lambda x: x if isinstance(x, str) else "+".join(x) or "none")
def test_gradients_where_wanted(name: str, wanted: tuple[str, ...]) -> None:
    """Each subset of requires_grad: what is wanted is right, and nothing else gets a gradient."""
    op, n, m = {**OPS, **POSITIVES}[name], 66, 66
    tensors = cases.random_tensors(op, n, m, 5, dtypes=[F32])
    period = n // 2 if cases.is_self(op) else None
    exclude = Exclude(diagonal=0, period=period)
    cases.check(op, tensors, wanted, **(samples(n, m, 9) if "sampled" in name else {"exclude": exclude}))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_shape_and_dtype_of_a_scale_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for name, op in OPS.items():
        tensors = cases.random_tensors(op, 8, 8, 4, dtypes=[F32])
        tensors |= {key: torch.full(shape, 0.5, dtype=dtype) for key in ("scale", "bias") if key in tensors}
        x = cases.leaves(tensors, ["scale", "bias"])
        options = {**op.options, **options_for(name, 8, 8, Exclude())}
        sum(out.sum() for out in op.ours(x, **options)).backward()
        exact = cases.leaves({key: t.double() for key, t in tensors.items()}, ["scale", "bias"])
        sum(out.sum() for out in op.reference(exact, **options)).backward()
        for key in {"scale", "bias"} & set(tensors):
            assert (x[key].grad.shape, x[key].grad.dtype) == (shape, dtype)
            torch.testing.assert_close(
                x[key].grad.double(), exact[key].grad, rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-5
            )


def test_numbers_and_tensors_give_the_same_bits() -> None:
    for name, op in OPS.items():
        tensors = cases.random_tensors(op, 20, 20, 6, dtypes=[F32])
        numbers = {key: float(x) if key in ("scale", "bias") else x for key, x in tensors.items()}
        options = {**op.options, **options_for(name, 20, 20, Exclude())}
        for got, want in zip(op.ours(numbers, **options), op.ours(tensors, **options)):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["similarity_cross_entropy", "similarity_softplus_sum"])
@pytest.mark.parametrize(
    "weight", [0.25, torch.tensor(0.25), torch.full((40,), 0.25)], ids=["number", "scalar", "rows"]
)
def test_forms_of_a_weight(name: str, weight: Any) -> None:
    tensors = cases.random_tensors(OPS[name], 40, 30, 6, dtypes=[F32])
    cases.check(OPS[name], tensors, weight=weight)


def test_row_maxima_are_those_of_the_scores_left_in() -> None:
    q, k, positive = torch.randn(300, 5), torch.randn(700, 5), torch.zeros(300)
    exclude = Exclude(
        diagonal=2, key_mask=torch.rand(700) < 0.3, query_groups=labels(300, 3), key_groups=labels(700, 3)
    )
    want = reference.scores(q, k, 2.0, exclude).amax(1)
    with_gradient = q.clone().requires_grad_()
    for queries in (q, with_gradient):
        for columns in (False, True):
            top = ops.similarity_logsumexp(queries, k, 2.0, exclude, columns=columns, return_max=True)[2]
            torch.testing.assert_close(top, want)
            assert not top.requires_grad
        torch.testing.assert_close(ops.similarity_cross_entropy(queries, k, positive, 2.0, exclude=exclude)[2], want)
    own = exclude._replace(diagonal=0, key_groups=None, key_mask=torch.rand(300) < 0.5)
    want = reference.scores(q, q, 2.0, reference.symmetric(own)).amax(1).masked_fill(~own.key_mask, -torch.inf)
    torch.testing.assert_close(ops.self_similarity_logsumexp(q, 2.0, own, return_max=True)[1], want)


def test_lse_of_the_cross_entropy_is_the_row_lse() -> None:
    q, k = torch.randn(33, 5, requires_grad=True), torch.randn(40, 5)
    exclude = Exclude(diagonal=0)
    _, row, _ = ops.similarity_cross_entropy(q, k, torch.zeros(33), 2.0, exclude=exclude)
    assert not row.requires_grad
    torch.testing.assert_close(row, reference.similarity_logsumexp(q.detach(), k, 2.0, exclude=exclude)[0])
