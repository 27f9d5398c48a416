# SPDX-License-Identifier: Apache-2.0
"""Every contrastive op by one calling convention, beside its definition over the whole matrix of scores.

The definition is written here from the scores s on, so that d(outputs)/ds is at hand: its gradients, and how large the
terms of those gradients are, which is what rounding errors are measured against. In float64 it is the truth; in the
precision of the input it is what eager PyTorch gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import Exclude
from sslkernels.reference import contrastive as reference

Tensors = dict[str, Tensor]
INF = torch.inf


class Op(NamedTuple):
    """`ours` and `reference` take the tensors, then options by name, and give the differentiable outputs.

    `define` takes the scores (-inf: left out), the raw scores, the other tensors and the options.
    """

    ours: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    define: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[str, ...] = ("q", "k", "scale")
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def logsumexp(s: Tensor, dim: int) -> Tensor:
    """A slice without a pair gives -inf and no gradient."""
    empty = (s == -INF).all(dim)
    return s.masked_fill(empty.unsqueeze(dim), 0.0).logsumexp(dim).masked_fill(empty, -INF)


def times(s: Tensor, beta: float) -> Tensor:
    return torch.where(s == -INF, s, s * beta)


def lse(s: Tensor, raw: Tensor, x: Tensors, dims: Sequence[int] = (1, 0), **options: Any) -> tuple[Tensor, ...]:
    if scales := options.get("scales"):
        return tuple(torch.stack([logsumexp(times(s, beta), dim) for beta in scales]) for dim in dims)
    return tuple(logsumexp(s, dim) for dim in dims)


def positive_of_diagonal(s: Tensor, raw: Tensor, x: Tensors, exclude: Exclude, **options: Any) -> tuple[Tensor, ...]:
    return *lse(s, raw, x), raw.diagonal(exclude.diagonal or 0)[: len(s)]


def partner(s: Tensor, raw: Tensor, x: Tensors, exclude: Exclude, **options: Any) -> tuple[Tensor, ...]:
    rows = torch.arange(len(s))
    return *lse(s, raw, x, (1,)), raw[rows, rows.roll(len(s) // 2)]


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=80.0)


def cross_entropy(
    s: Tensor, raw: Tensor, x: Tensors, weight: Any = 1.0, decoupled: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    margin = logsumexp(s, 1) - x["positive"]
    return ((weight * (margin if decoupled else softplus(margin))).sum(),)


def softplus_rows(s: Tensor, raw: Tensor, x: Tensors, **options: Any) -> tuple[Tensor, ...]:
    return (softplus(s + x["bias"]).sum(1),)


def softplus_sum(s: Tensor, raw: Tensor, x: Tensors, weight: Any = 1.0, **options: Any) -> tuple[Tensor, ...]:
    return ((weight * softplus_rows(s, raw, x)[0]).sum(),)


def sampled(
    s: Tensor, raw: Tensor, x: Tensors, indices: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    own = s.gather(1, indices)
    return (logsumexp(own if mask is None else own.masked_fill(~mask, -INF), 1),)


SCALES = (1.0, 0.25, 0.0, 2.0)
CROSS = ("q", "k", "scale", "positive")
BIASED = ("q", "k", "scale", "bias")
OPS: dict[str, Op] = {
    "similarity_logsumexp": Op(
        lambda x, **o: ops.similarity_logsumexp(**x, **o),
        lambda x, **o: reference.similarity_logsumexp(**x, **o),
        lse,
    ),
    "similarity_logsumexp rows": Op(
        lambda x, **o: ops.similarity_logsumexp(**x, **o, columns=False)[:1],
        lambda x, **o: reference.similarity_logsumexp(**x, **o, columns=False)[:1],
        lambda *args, **o: lse(*args, dims=(1,), **o),
    ),
    "similarity_logsumexp scales": Op(
        lambda x, **o: ops.similarity_logsumexp(**x, **o),
        lambda x, **o: reference.similarity_logsumexp(**x, **o),
        lse,
        options={"scales": SCALES},
    ),
    "self_similarity_logsumexp": Op(
        lambda x, **o: (ops.self_similarity_logsumexp(x["q"], x["scale"], **o),),
        lambda x, **o: (reference.self_similarity_logsumexp(x["q"], x["scale"], **o),),
        lambda *args, **o: lse(*args, dims=(1,), **o),
        ("q", "scale"),
    ),
    "self_similarity_logsumexp scales": Op(
        lambda x, **o: (ops.self_similarity_logsumexp(x["q"], x["scale"], **o),),
        lambda x, **o: (reference.self_similarity_logsumexp(x["q"], x["scale"], **o),),
        lambda *args, **o: lse(*args, dims=(1,), **o),
        ("q", "scale"),
        {"scales": SCALES},
    ),
    "similarity_cross_entropy": Op(
        lambda x, **o: ops.similarity_cross_entropy(**x, **o)[:1],
        lambda x, **o: (reference.similarity_cross_entropy(**x, **o),),
        cross_entropy,
        CROSS,
    ),
    "similarity_cross_entropy decoupled": Op(
        lambda x, **o: ops.similarity_cross_entropy(**x, **o)[:1],
        lambda x, **o: (reference.similarity_cross_entropy(**x, **o),),
        cross_entropy,
        CROSS,
        {"decoupled": True},
    ),
    "similarity_softplus": Op(
        lambda x, **o: (ops.similarity_softplus(**x, **o),),
        lambda x, **o: (reference.similarity_softplus(**x, **o),),
        softplus_rows,
        BIASED,
    ),
    "similarity_softplus_sum": Op(
        lambda x, **o: (ops.similarity_softplus_sum(**x, **o),),
        lambda x, weight=1.0, **o: ((weight * reference.similarity_softplus(**x, **o)).sum(),),
        softplus_sum,
        BIASED,
    ),
    "sampled_logsumexp": Op(
        lambda x, **o: (ops.sampled_logsumexp(**x, **o),),
        lambda x, **o: (reference.sampled_logsumexp(**x, **o),),
        sampled,
    ),
}
# with their positives: `exclude` must have the diagonal, or the period of two views
POSITIVES: dict[str, Op] = {
    "similarity_logsumexp positives": Op(
        lambda x, **o: ops.similarity_logsumexp(**x, **o, return_positive=True),
        lambda x, exclude, **o: (
            *reference.similarity_logsumexp(**x, exclude=exclude),
            reference.positives(x["q"], x["k"], x["scale"], exclude.diagonal),
        ),
        positive_of_diagonal,
    ),
    "self_similarity_logsumexp positives": Op(
        lambda x, **o: ops.self_similarity_logsumexp(x["q"], x["scale"], **o, return_positive=True),
        lambda x, exclude, **o: (
            reference.self_similarity_logsumexp(x["q"], x["scale"], exclude=exclude),
            reference.positives(x["q"], x["q"], x["scale"], exclude.period),
        ),
        partner,
        ("q", "scale"),
    ),
}


def is_self(op: Op) -> bool:
    return "k" not in op.tensors


def excluded(n: int, m: int, exclude: Exclude, of_self: bool = False) -> Tensor:
    """(N, M) bool, written from the words of `Exclude`, pair by pair."""
    groups = [None if g is None else g.tolist() for g in (exclude.query_groups, exclude.key_groups)]
    groups[1] = groups[0] if of_self else groups[1]
    keep = [True] * m if exclude.key_mask is None else exclude.key_mask.tolist()

    def left_out(i: int, j: int) -> bool:
        by_index = exclude.diagonal is not None and (
            j == i + exclude.diagonal if exclude.period is None else (j - i - exclude.diagonal) % exclude.period == 0
        )
        by_group = groups[0] is not None and (groups[0][i] == groups[1][j]) != exclude.differ
        return by_index or by_group or not keep[j] or (of_self and not keep[i])

    return torch.tensor([[left_out(i, j) for j in range(m)] for i in range(n)], dtype=torch.bool).view(n, m)


def random_tensors(op: Op, n: int, m: int, d: int, *, scale: float = 1.0, dtypes: Sequence[torch.dtype]) -> Tensors:
    """Features whose logits have a standard deviation of about `scale`; q and k in the two dtypes."""
    dtype = reference.compute_dtype(torch.empty(0, dtype=dtypes[0]), torch.empty(0, dtype=dtypes[-1]))
    make = {
        "q": lambda: torch.randn(n, d).to(dtypes[0]),
        "k": lambda: torch.randn(m, d).to(dtypes[-1]),
        "scale": lambda: torch.tensor(scale / max(d, 1) ** 0.5, dtype=dtype),
        "bias": lambda: torch.tensor(-0.7, dtype=dtype),
        "positive": lambda: torch.randn(n, dtype=dtype),
    }
    return {name: make[name]() for name in op.tensors}


class Result(NamedTuple):
    outputs: tuple[Tensor, ...]
    gradients: Tensors


def leaves(tensors: Tensors, wanted: Sequence[str]) -> Tensors:
    """The same memory and strides, with gradient where wanted."""
    return {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}


def evaluate(
    op: Callable[..., tuple[Tensor, ...]],
    tensors: Tensors,
    cotangents: Sequence[Tensor],
    wanted: Sequence[str] | None = None,
    **options: Any,
) -> Result:
    """Outputs, and the gradients of sum cotangent * output of each tensor (or of the `wanted` ones)."""
    wanted = list(tensors) if wanted is None else wanted
    x = leaves(tensors, wanted)
    outputs = op(x, **options)
    if not wanted:
        assert not any(out.requires_grad for out in outputs)
        return Result(outputs, {})
    seeds = [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [x[name] for name in wanted], seeds, materialize_grads=True)
    return Result(tuple(out.detach() for out in outputs), dict(zip(wanted, found)))


class Truth(NamedTuple):
    """`sizes`: of each result, how large its terms are. `logit`: the largest |s|; `terms`: that of what s adds up."""

    result: Result
    sizes: dict[str, Tensor]
    logit: float
    terms: float


def cotangents_of(op: Op, tensors: Tensors, positive: bool = False, **options: Any) -> list[Tensor]:
    """One random cotangent an output, in float32 so that it is the same number everywhere."""
    with torch.no_grad():
        shapes = [out.shape for out in op.ours(tensors, **options)]
    return [torch.rand(shape) + 0.5 if positive else torch.randn(shape) for shape in shapes]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than they bring where others use the processor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@one_thread()
def truth(
    op: Op, tensors: Tensors, cotangents: Sequence[Tensor], dtype: torch.dtype = torch.float64, **options: Any
) -> Truth:
    """The definition in `dtype`; sums of exponentials by torch.logsumexp, gradients by autograd from s on."""
    x = {name: t.detach().to(dtype) for name, t in tensors.items()}
    q, scale = x["q"], x["scale"]
    k = q if is_self(op) else x["k"]
    exclude = options.get("exclude", Exclude())
    out = reference_excluded(len(q), len(k), exclude, is_self(op))
    raw = ((q * scale) @ k.T).requires_grad_()
    rest = {name: x[name].requires_grad_() for name in ("bias", "positive") if name in x}
    outputs = op.define(raw.masked_fill(out, -INF), raw, rest, **options)
    inputs = [raw, *rest.values()]
    seeds = [c.to(dtype) for c in cotangents]
    w, *others = torch.autograd.grad(outputs, inputs, seeds, materialize_grads=True, retain_graph=True)
    size, *_ = torch.autograd.grad(outputs, inputs, [c.abs() for c in seeds], materialize_grads=True)
    products = (q @ k.T).detach()

    def gradients(w: Tensor, q: Tensor, k: Tensor, scale: Tensor, products: Tensor) -> Tensors:
        dq, dk = scale * (w @ k), scale * (w.T @ q)
        pair = {"q": dq + dk} if is_self(op) else {"q": dq, "k": dk}
        return {**pair, "scale": (w * products).sum(), **dict(zip(rest, others))}

    found = gradients(w, q, k, scale, products)
    sizes = gradients(size.abs(), q.abs(), k.abs(), scale.abs(), q.abs() @ k.abs().T)
    outputs = tuple(o.detach() for o in outputs)
    sizes |= {f"output {i}": o.abs().clamp(min=1.0) for i, o in enumerate(outputs)}
    logits = raw.detach().masked_fill(out, 0.0).abs()
    terms = (scale.abs() * (q.abs() @ k.abs().T)).masked_fill(out, 0.0)
    return Truth(
        Result(outputs, {name: found[name] for name in tensors}),
        sizes,
        float(logits.max()) if logits.numel() else 0.0,
        float(terms.max()) if terms.numel() else 0.0,
    )


def reference_excluded(n: int, m: int, exclude: Exclude, of_self: bool) -> Tensor:
    """The same matrix as `excluded`, which a test compares, fast enough for large ones."""
    out = reference.excluded_pairs(n, m, torch.device("cpu"), reference.symmetric(exclude) if of_self else exclude)
    return out | ~exclude.key_mask[:, None] if of_self and exclude.key_mask is not None else out


def norm(x: Tensor) -> float:
    return float(x.double().norm()) if x.numel() else 0.0


def errors(result: Result, exact: Result) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each output and gradient the error and the truth; where the truth is not finite, the two must be equal."""
    named = {f"output {i}": pair for i, pair in enumerate(zip(result.outputs, exact.outputs, strict=True))}
    named |= {name: (x, exact.gradients[name]) for name, x in result.gradients.items()}
    out = {}
    for name, (x, want) in named.items():
        assert x.shape == want.shape, f"{name} has shape {tuple(x.shape)}, not {tuple(want.shape)}"
        x, finite = x.detach().double(), want.isfinite()
        torch.testing.assert_close(x[~finite], want[~finite].double(), equal_nan=True, msg=f"{name} where not finite")
        out[name] = (x - want).where(finite, 0.0), want.where(finite, 0.0)
    return out


def assert_stable(result: Result, exact: Truth, compute: torch.dtype, tensors: Tensors) -> None:
    """Each error is within eps * max(84, 4 max|logit|) of what the result's terms add up to, plus its own rounding.

    84 eps is 1e-5 in float32. For random shapes: where terms cancel, no relative error can be promised.
    """
    bound = torch.finfo(compute).eps * max(84.0, 4.0 * exact.terms)
    for name, (error, want) in errors(result, exact.result).items():
        stored = torch.finfo(tensors[name].dtype) if name in tensors else torch.finfo(compute)
        rounding = stored.eps / 2 * norm(want) + stored.smallest_normal * stored.eps * max(error.numel(), 1) ** 0.5
        size = norm(exact.sizes[name].nan_to_num(0.0, 0.0, 0.0))
        assert norm(error) <= bound * size + rounding, (
            f"{name}: error {norm(error):.3e} above {bound * size + rounding:.3e}, norm {norm(want):.3e}"
        )


def check(
    op: Op, tensors: Tensors, wanted: Sequence[str] | None = None, positive: bool = False, **options: Any
) -> None:
    """Outputs and gradients of the op against the definition in float64, for one random cotangent an output."""
    options = {**op.options, **options}
    cotangents = cotangents_of(op, tensors, positive, **options)
    result = evaluate(op.ours, tensors, cotangents, wanted, **options)
    compute = reference.compute_dtype(*(tensors[name] for name in ("q", "k") if name in tensors))
    for out in result.outputs:
        assert out.dtype == compute
    for name, gradient in result.gradients.items():
        assert gradient.dtype == tensors[name].dtype
    assert_stable(result, truth(op, tensors, cotangents, **options), compute, tensors)
