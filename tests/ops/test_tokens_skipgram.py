# SPDX-License-Identifier: Apache-2.0
"""skipgram against its formula written out with torch's functions, in autograd and in the compiler."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkernels import check_values
from sslkernels.ops import _skipgram as op
from sslkernels.ops import skipgram
from sslkernels.reference import tokens as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = (op.loss, op.backward, op.backward_rows)


class Case(NamedTuple):
    u: Tensor
    v: Tensor
    inputs: Tensor
    outputs: Tensor
    negatives: Tensor


def random_case(
    b: int, k: int, d: int, v: int = 11, w: int = 7, *, dtypes: tuple[torch.dtype, ...] = DTYPES[:1], scale: float = 0.5
) -> Case:
    """Few words: rows come again, and negatives are often the positive."""
    u, o = (scale * torch.randn(n, d).to(dtype) for n, dtype in zip((v, w), itertools.cycle(dtypes)))
    return Case(u, o, torch.randint(v, (b,)), torch.randint(w, (b,)), torch.randint(w, (b, k)))


def written_out(case: Case, reduction: str = "sum") -> Tensor:
    """As a user of embeddings has it."""
    dtype = torch.promote_types(torch.promote_types(case.u.dtype, case.v.dtype), torch.float32)
    u, v, n = F.embedding(case.inputs, case.u), F.embedding(case.outputs, case.v), F.embedding(case.negatives, case.v)
    u, v, n = u.to(dtype), v.to(dtype), n.to(dtype)
    counts = case.negatives != case.outputs[:, None]
    positive = F.softplus(-(u * v).sum(-1), threshold=700.0)
    noise = F.softplus((n * u[:, None]).sum(-1), threshold=700.0).masked_fill(~counts, 0.0)
    loss = positive + noise.sum(-1)
    return {"none": lambda: loss, "sum": loss.sum, "mean": loss.mean}[reduction]()


def ours(case: Case, reduction: str = "sum", **options: Any) -> Tensor:
    return skipgram(*case, reduction=reduction, **options)


def evaluate(function: Any, case: Case, cotangent: Tensor, **options: Any) -> list[Tensor]:
    """Value and both gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in case[:2]]
    value = function(case._replace(u=leaves[0], v=leaves[1]), **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, cotangent.to(value.dtype).expand(value.shape))]


def check(case: Case, reduction: str = "sum") -> None:
    """Never more than twice eager's error in the same precision, plus roundings: by value, and by a gradient's norm.

    A score of D products and a sum of 1 + K terms are rounded in an order of their own: 4 roundings of all terms.
    """
    cotangent = torch.rand(len(case.inputs)) + 0.5 if reduction == "none" else torch.tensor(0.7)
    exact = evaluate(written_out, case._replace(u=case.u.double(), v=case.v.double()), cotangent, reduction=reduction)
    eager = evaluate(written_out, case, cotangent, reduction=reduction)
    got = evaluate(ours, case, cotangent, reduction=reduction)
    for x, e, truth in zip(got, eager, exact, strict=True):
        assert (x.shape, x.dtype) == (e.shape, e.dtype)
        wide = torch.float64 in (case.u.dtype, case.v.dtype)
        eps = 1e-13 if wide else 4 * torch.finfo(torch.float32).eps
        error, allowed = (x.double() - truth).norm(), 2 * (e.double() - truth).norm()
        assert error <= allowed + (eps + torch.finfo(x.dtype).eps) * (truth.norm() + 1e-30), (error, allowed)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("d", [1, 7, 16, 100, 129])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_is_its_formula(k: int, d: int, reduction: str) -> None:
    check(random_case(37, k, d), reduction)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_shape(b: int, k: int, d: int, v: int, w: int, data: Any) -> None:
    dtypes = data.draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    check(random_case(b, k, d, v, w, dtypes=dtypes), data.draw(st.sampled_from(["none", "sum", "mean"])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_instruction_set(dtype: torch.dtype, level: int) -> None:
    check(random_case(23, 5, 83, dtypes=(dtype,)))


def test_threads(threads: int) -> None:
    """Enough for two threads; right with each, and the same bits whoever counts."""
    case = random_case(3000, 5, 64, 301, 257)
    check(case)
    one = torch.tensor(1.0)
    before = evaluate(ours, case, one)
    torch.set_num_threads(3 - threads)
    for x, y in zip(before, evaluate(ours, case, one), strict=True):
        assert torch.equal(x, y)


def test_strides_of_every_argument() -> None:
    case = random_case(12, 5, 9)
    wide = torch.randn(22, 40)
    strided = Case(
        *(x.t().contiguous().t() for x in case[:2]),
        *(torch.stack((x, x), -1)[..., 0] for x in case[2:4]),
        case.negatives.t().contiguous().t(),
    )
    assert not any(x.is_contiguous() for x in strided)
    for reduction in ("sum", "none"):
        one = torch.ones(12) if reduction == "none" else torch.tensor(1.0)
        torch.testing.assert_close(
            evaluate(ours, strided, one, reduction=reduction), evaluate(ours, case, one, reduction=reduction)
        )
    rows = case._replace(u=wide[::2, :9], v=wide[:7, 1::4][:, :9])
    check(rows)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_small_loss_keeps_its_digits(size: float) -> None:
    """Where every pair is known, the loss is a sum of exp(-score)."""
    score = -torch.log(torch.tensor(size)).item()
    u = torch.tensor([[1.0, 0.0]])
    v = torch.tensor([[score, 0.0], [-score, 0.0]])
    case = Case(u, v, torch.tensor([0]), torch.tensor([0]), torch.tensor([[1]]))
    got, exact = (evaluate(f, c, torch.tensor(1.0)) for f, c in (
        (ours, case), (written_out, case._replace(u=u.double(), v=v.double()))))  # fmt: skip
    for x, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=2e-6, atol=0.0)


def test_large_scores() -> None:
    case = random_case(20, 5, 30, scale=1e4)
    value, *grads = evaluate(ours, case, torch.tensor(1.0))
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    check(case)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_to_their_pairs_alone(bad: float) -> None:
    case = random_case(30, 3, 5)
    case.v[2, 1] = bad
    rows = torch.cat((case.outputs[:, None], case.negatives), 1)
    touched = (rows == 2).any(1)
    assert touched.any() and not touched.all()
    losses = ours(case, "none")
    assert losses[~touched].isfinite().all()
    expected = written_out(case, "none")
    assert torch.equal(losses.isnan(), expected.isnan()) and torch.equal(losses.isinf(), expected.isinf())
    du = evaluate(ours, case, torch.ones(30), reduction="none")[1]
    spoilt = torch.zeros(11, dtype=torch.bool).index_fill(0, case.inputs[touched], True)
    assert du[~spoilt].isfinite().all()
    if math.isnan(bad):
        assert du[spoilt].isnan().any(1).all()


def test_a_negative_that_is_the_positive_is_skipped() -> None:
    case = random_case(6, 4, 3)
    case.negatives[:, 1] = case.outputs
    without = case._replace(negatives=case.negatives[:, [0, 2, 3]])
    one = torch.tensor(1.0)
    torch.testing.assert_close(evaluate(ours, case, one), evaluate(ours, without, one))
    case.v[case.outputs[0]] = float("inf")  # skipped, not multiplied by zero
    assert not ours(case._replace(u=case.u.abs()), "none")[0].isnan()


def test_empty_batch() -> None:
    case = random_case(0, 5, 3)
    value, *grads = evaluate(ours, case, torch.tensor(1.0))
    assert value == 0 and not any(g.any() for g in grads)
    assert ours(case, "mean").isnan() and ours(case, "none").shape == (0,)


# autograd


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(reduction: str) -> None:
    case = random_case(9, 3, 4, dtypes=(torch.float64,))

    def function(u: Tensor, v: Tensor) -> Tensor:
        return ours(case._replace(u=u, v=v), reduction)

    assert torch.autograd.gradcheck(function, (case.u.requires_grad_(), case.v.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_sparse_gradients(reduction: str, dtype: torch.dtype) -> None:
    case = random_case(17, 4, 6, dtypes=(dtype,))
    one = torch.rand(17) if reduction == "none" else torch.tensor(-0.3)
    dense = evaluate(ours, case, one, reduction=reduction)
    value, *grads = evaluate(ours, case, one, reduction=reduction, sparse=True)
    torch.testing.assert_close(value, dense[0])
    assert [g._nnz() for g in grads] == [17, 17 * 5]
    for sparse, full in zip(grads, dense[1:], strict=True):
        assert sparse.is_sparse and sparse.dtype == dtype and sparse.shape == full.shape
        tolerance = 40 * torch.finfo(dtype).eps  # each addend is rounded before they are summed
        torch.testing.assert_close(sparse.double().to_dense(), full.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_only_what_is_asked_for(which: int, sparse: bool) -> None:
    case = random_case(9, 3, 4)
    leaf = case[which].clone().requires_grad_()
    tables = [leaf if i == which else x for i, x in enumerate(case[:2])]
    ours(Case(*tables, *case[2:]), sparse=sparse).backward()
    expected = evaluate(ours, case, torch.tensor(1.0))[1 + which]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.to_dense(), expected)
    arguments = (torch.tensor(1.0), torch.rand(9, 4), *case)
    for name in (op.backward, op.backward_rows):
        assert [x.numel() == 0 for x in name(*arguments, [which == 0, which == 1])] == [which == 1, which == 0]


def test_double_backward_is_refused() -> None:
    case = random_case(9, 3, 4)
    loss = ours(case._replace(u=case.u.requires_grad_()))
    (grad,) = torch.autograd.grad(loss * loss, case.u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported; use sslkernels\.reference"):
        grad.sum().backward()


def samples(name: Any) -> list[tuple[Any, ...]]:
    out = []
    for dtype, reduction in ((torch.float32, "sum"), (torch.bfloat16, "mean"), (torch.float64, "none")):
        case = random_case(5, 3, 4, dtypes=(dtype,))
        if name is op.loss:
            tables = [x.requires_grad_() for x in case[:2]]
            out.append((*tables, *case[2:], reduction, False))
        else:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            grad = torch.rand(() if reduction != "none" else 5, dtype=wide)
            out.append((grad, torch.rand(5, 4, dtype=wide), *case, [True, reduction == "sum"]))
    return out


@pytest.mark.parametrize("name", OPS, ids=lambda x: x._schema.name)
def test_opcheck(name: Any) -> None:
    for arguments in samples(name):
        torch.library.opcheck(name, arguments)


@pytest.mark.parametrize("name", OPS, ids=lambda x: x._schema.name)
def test_the_reference_gives_what_the_kernel_gives(name: Any, fallback: Any) -> None:
    for arguments in samples(name):
        with torch.no_grad():
            got, want = name(*arguments), fallback(name, *arguments)
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        torch.testing.assert_close(got, want)


def test_the_public_reference_is_the_definition() -> None:
    case = random_case(9, 3, 4)
    one = torch.tensor(1.0)
    for reduction in ("sum", "mean"):
        got = evaluate(lambda c, **o: reference.skipgram(*c, **o), case, one, reduction=reduction)
        torch.testing.assert_close(got, evaluate(written_out, case, one, reduction=reduction))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_with_its_backward(backend: str) -> None:
    torch._dynamo.reset()
    case = random_case(9, 3, 4)
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    one = torch.tensor(1.0)
    torch.testing.assert_close(evaluate(compiled, case, one), evaluate(ours, case, one))


def test_autocast_leaves_the_arithmetic_in_float32() -> None:
    case = random_case(9, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(case), ours(case)) and ours(case).dtype == torch.float32


# input that is refused


@pytest.mark.parametrize("bad", [-1, 7, 11])
def test_an_id_outside_its_table(bad: int, fallback: Any) -> None:
    for name, message in (("inputs", r"\[0, 11\)"), ("outputs", r"\[0, 7\)"), ("negatives", r"\[0, 7\)")):
        case = random_case(5, 3, 4)
        if name == "inputs" and bad == 7:
            continue
        getattr(case, name)[2] = bad
        with pytest.raises(ValueError, match=rf"{name} must be in {message}, got {bad}"):
            ours(case)
        with pytest.raises(RuntimeError, match=rf"{name} must be in {message}, got {bad}"):
            op.loss(*case, "sum", False)
        loss, slopes = fallback(op.loss, *case, "none", False)  # where values are not read
        assert loss.isnan().tolist() == [False, False, True, False, False] and slopes[2].isnan().any()
        grads = fallback(op.backward, torch.ones(5), slopes, *case, [True, True])
        assert all(g.isnan().any() and g.isfinite().any() for g in grads)


def with_(**changes: Any) -> dict[str, Any]:
    names = ("input_weight", "output_weight", "inputs", "outputs", "negatives")
    return {**dict(zip(names, random_case(5, 3, 4))), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"input_weight": torch.zeros(3)}, ValueError, r"input_weight must be 2-D .*\(3,\)"),
        ({"input_weight": [1.0]}, TypeError, "input_weight must be a torch.Tensor, got list"),
        ({"output_weight": torch.zeros(7, 5)}, ValueError, r"output_weight must have as many features .*\(7, 5\)"),
        ({"output_weight": torch.zeros(7, 4).long()}, TypeError, "output_weight must have a floating dtype"),
        ({"inputs": torch.zeros(5, 1).long()}, ValueError, r"inputs must have shape \(B,\), got \(5, 1\)"),
        ({"inputs": torch.zeros(5).int()}, TypeError, "inputs must be torch.int64, got torch.int32"),
        ({"outputs": torch.zeros(4).long()}, ValueError, r"outputs must have shape \(5,\), got \(4,\)"),
        ({"outputs": torch.zeros(5)}, TypeError, "outputs must be torch.int64, got torch.float32"),
        ({"negatives": torch.zeros(5).long()}, ValueError, r"negatives must have shape \(5, K\), got \(5,\)"),
        ({"negatives": torch.zeros(4, 3).long()}, ValueError, r"negatives must have shape \(5, K\), got \(4, 3\)"),
        ({"negatives": torch.zeros(5, 3, device="meta").long()}, ValueError, "negatives must be on the device"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'sum', 'mean', 'none', got 'max'"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        skipgram(**with_(**changes))


def test_values_are_not_read_from_fakes() -> None:
    with check_values(), torch._subclasses.FakeTensorMode() as mode:
        case = Case(*(mode.from_tensor(x) for x in random_case(5, 3, 4)))
        assert ours(case, "none").shape == (5,)
