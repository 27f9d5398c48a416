# SPDX-License-Identifier: Apache-2.0
"""Contrastive primitives: log-sum-exps and softplus sums of scaled similarities s_ij = scale * <q_i, k_j>.

The N x M matrix is swept in tiles and not stored (on the CPU it is kept for backward below 4 MiB, which is faster).
Features may be float32, float64, bfloat16 or float16, mixed and strided; arithmetic is float32 (float64 if any is
float64), and so are the results. `scale` and `bias` are Python numbers or tensors of one element, which then get their
gradient. Under autocast features are cast and nothing else is. Double backward raises. NaN in gives NaN out.
Definitions in plain PyTorch: `sslkernels.reference.contrastive`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._autocast import cast_features
from sslkernels.ops import _contrastive as op
from sslkernels.ops import _contrastive_sums as sum_op
from sslkernels.ops._contrastive_distractors import distractor_counts
from sslkernels.ops._emitted import wants_grad
from sslkernels.reference._precision import compute_dtype
from sslkernels.reference.contrastive import NOTHING, Exclude, symmetric

__all__ = [
    "Exclude",
    "distractor_counts",
    "l2_normalize",
    "sampled_logsumexp",
    "self_similarity_logsumexp",
    "similarity_cross_entropy",
    "similarity_logsumexp",
    "similarity_softplus",
    "similarity_softplus_sum",
    "two_view_cross_entropy",
]

KEPT_BYTES = 4 << 20
SELF = Exclude(diagonal=0)
_FAR = 1 << 62  # farther than any key, and a row's number added to it is still an int64
EPS = 1e-12  # torch.nn.functional.normalize's


def _check(q: Tensor, k: Tensor, exclude: Exclude, **scalars: Any) -> None:
    check.features(q=q, k=k)
    for name, x in scalars.items():
        check.number(name, x, q)
    if exclude.period is not None and (exclude.diagonal is None or exclude.period < 1):
        raise ValueError(f"exclude.period must be positive and come with exclude.diagonal, got {exclude.period}")
    for name, x in (("diagonal", exclude.diagonal), ("period", exclude.period)):
        if x is not None and not -_FAR < x < _FAR:
            raise ValueError(f"exclude.{name} must be between -2^62 and 2^62, got {x}")
    if (exclude.query_groups is None) != (exclude.key_groups is None):
        raise ValueError("exclude.query_groups and exclude.key_groups must come together, got only one of them")
    if exclude.query_groups is not None:
        check.vector("exclude.query_groups", exclude.query_groups, q.shape[0], q, (torch.int64,))
        check.vector("exclude.key_groups", exclude.key_groups, k.shape[0], q, (torch.int64,))
    if exclude.key_mask is not None:
        check.vector("exclude.key_mask", exclude.key_mask, k.shape[0], q, (torch.bool,))


def _multipliers(scales: Sequence[float] | None) -> tuple[float, ...]:
    if scales is None:
        return (1.0,)
    if len(scales) == 0:
        raise ValueError("scales must hold at least one multiplier, got none")
    for beta in scales:
        check.in_range("scales", beta, 0.0, math.inf)
    return tuple(float(beta) for beta in scales)


def _split(x: Tensor | float) -> tuple[Tensor | None, float]:
    return (x, 1.0) if isinstance(x, Tensor) else (None, float(x))


def _keep(q: Tensor, k: Tensor, wanted: Sequence[bool]) -> bool:
    """Whether backward is to read the scores: a GPU's kernels always compute them again."""
    size = q.shape[0] * k.shape[0] * compute_dtype(q, k).itemsize
    return any(wanted) and q.device.type == "cpu" and size <= KEPT_BYTES


def emits_gradient(wanted: Sequence[bool], scales: Any, columns: bool, return_positive: bool) -> bool:
    """Whether rows alone are asked for over frozen keys; wanted: which of queries, keys, scale need a gradient."""
    return not columns and scales is None and not return_positive and not wanted[1] and any(wanted)


def l2_normalize(*xs: Tensor, eps: float = EPS) -> Tensor:
    """Rows of unit length, the tensors one below the other: cat and normalize in one pass, with one backward.

        z_i = x_i / max(|x_i|, eps)

    Args:
        xs: (N_1, D), (N_2, D), ...: one dtype and device. 16-bit rows are normalised in float32 and rounded once.

    Returns:
        z, (N_1 + N_2 + ..., D), dense, in the dtype of xs.

    Raises:
        ValueError, TypeError: no tensor; one of another rank, width, dtype or device.

    Example:
        >>> l2_normalize(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([16, 16])
    """
    _check_stack(xs)
    check.positive("eps", eps)
    return op.normalize(xs, eps)[0]


def similarity_logsumexp(
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
    *,
    scales: Sequence[float] | None = None,
    columns: bool = True,
    return_positive: bool = False,
    return_max: bool = False,
    autocast: bool = True,
) -> Any:
    """Row and column log-sum-exps of the similarities of two sets of features.

        s_ij      = scale * <q_i, k_j>
        row_lse_i = log sum_j exp(s_ij)        over the pairs that `exclude` leaves; -inf where it leaves none
        col_lse_j = log sum_i exp(s_ij)

    Args:
        q: queries, (N, D).
        k: keys, (M, D).
        scale: number, or tensor of one element: the inverse temperature.
        exclude: pairs to leave out.
        scales: multipliers beta >= 0 of s; the results then have a first axis, one row a beta, from one product q k^T.
        columns: False leaves col_lse out (None in its place). Where k then needs no gradient, the gradient of q is
            emitted by the forward sweep and k is not saved: it may be overwritten before backward (a queue).
        return_positive: also return positive_i = s_ij at j = i + exclude.diagonal, (N,): the pairs that a softmax loss
            keeps out of the sweep. Needs 0 <= diagonal <= M - N, no period.
        return_max: also return max_j s_ij, (N,), detached.

    Returns:
        row_lse (N,), col_lse (M,) or None, then the positives and the row maxima if asked for.

    Raises:
        ValueError, TypeError: an argument of another rank, width, dtype or device; a number that is not finite.

    Example:
        >>> q, k = torch.randn(8, 16), torch.randn(32, 16)
        >>> row_lse, col_lse = similarity_logsumexp(q, k, 10.0, Exclude(diagonal=0))
        >>> row_lse.shape, col_lse.shape
        (torch.Size([8]), torch.Size([32]))
    """
    _check(q, k, exclude, scale=scale)
    multipliers = _multipliers(scales)
    q, k = cast_features(q, k, autocast=autocast)
    offset = exclude.diagonal if return_positive else None
    if return_positive and (offset is None or exclude.period or not 0 <= offset <= k.shape[0] - q.shape[0]):
        raise ValueError(
            f"return_positive needs exclude.diagonal in [0, {k.shape[0] - q.shape[0]}] and no period, got {offset}"
        )
    pair, wanted = _split(scale), wants_grad(q, k, scale)
    if emits_gradient(wanted, scales, columns, return_positive):
        row, top, _ = op.attention(q, k, *pair, *exclude)
        return (row, None, top) if return_max else (row, None)
    kept = _keep(q, k, wanted)
    row, col, positive, top, _ = op.lse(q, k, *pair, *exclude, multipliers, columns, kept, offset)
    if scales is None:
        row, col = row[0], col[0] if columns else None
    out = (row, col if columns else None)
    return out + (positive,) * return_positive + (top,) * return_max


def self_similarity_logsumexp(
    z: Tensor,
    scale: Tensor | float = 1.0,
    exclude: Exclude = SELF,
    *,
    scales: Sequence[float] | None = None,
    return_positive: bool = False,
    return_max: bool = False,
    autocast: bool = True,
) -> Any:
    """Log-sum-exp of each feature's similarities to the others; only half of the symmetric matrix is computed.

        lse_i = log sum_j exp(scale * <z_i, z_j>)      over the pairs that `exclude` leaves

    NT-Xent stacks its two views and leaves out self and partner: `Exclude(diagonal=0, period=N)` for 2 N rows. SupCon
    gives its labels as `query_groups` (here both sides), and `differ=True` for the pairs of one label.

    Args:
        z: features, (M, D).
        scale, scales, return_max: as in `similarity_logsumexp`.
        exclude: diagonal must be 0 or None, key_groups None; key_mask leaves a row out as query and as key.
        return_positive: also return each row's score with its partner, the row exclude.period further (of 2 periods).

    Returns:
        lse (M,), then the positives (M,) and the row maxima (M,) if asked for.

    Raises:
        ValueError, TypeError: as in `similarity_logsumexp`; a rule that is not symmetric.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
        >>> self_similarity_logsumexp(z, 2.0, Exclude(diagonal=0, period=4)).shape
        torch.Size([8])
    """
    if exclude.diagonal not in (None, 0) or exclude.key_groups is not None:
        raise ValueError(
            "exclude must be symmetric: diagonal 0 or None and key_groups None, got "
            f"diagonal {exclude.diagonal}, key_groups {'given' if exclude.key_groups is not None else None}"
        )
    check.features(z=z)
    _check(z, z, symmetric(exclude), scale=scale)
    if return_positive and (exclude.period is None or z.shape[0] != 2 * exclude.period):
        raise ValueError(f"return_positive needs z of 2 * exclude.period rows, got {z.shape[0]} and {exclude.period}")
    offset = exclude.period if return_positive else None
    multipliers = _multipliers(scales)
    (z,) = cast_features(z, autocast=autocast)
    kept = _keep(z, z, wants_grad(z, scale))
    pairs = (exclude.diagonal, exclude.period, exclude.query_groups, exclude.key_mask, exclude.differ)
    lse, positive, top, _ = op.self_lse(z, *_split(scale), *pairs, multipliers, kept, offset)
    lse = lse[0] if scales is None else lse
    out = (lse,) + (positive,) * return_positive + (top,) * return_max
    return out if len(out) > 1 else lse


def similarity_cross_entropy(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    scale: Tensor | float = 1.0,
    *,
    weight: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
    decoupled: bool = False,
    autocast: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of softmax cross-entropies against the keys, loss and all gradients in one sweep.

        lse_i = log sum_j exp(scale * <q_i, k_j>)      over the negatives: the pairs that `exclude` leaves
        loss  = sum_i weight_i softplus(lse_i - positive_i)        (decoupled: weight_i (lse_i - positive_i))

    softplus(lse - positive) is -log(exp(positive) / (exp(positive) + sum of negatives)) without its cancellation.
    The weights of a mean or a sum are known in the forward, so the CPU takes three products where two sweeps take four.
    A GPU takes two where k needs no gradient (three beyond D = 128), else four (five up to D = 128): no N x M is kept.

    Args:
        q, k, scale, exclude: as in `similarity_logsumexp`.
        positive: the positive's logit, already scaled, (N,), float32 or float64.
        weight: number or (N,): constants, without gradient (1/N for a mean).

    Returns:
        loss (scalar), row_lse (N,) and row maxima (N,), the last two detached.

    Raises:
        ValueError, TypeError: as in `similarity_logsumexp`; positive or weight of another shape.

    Example:
        >>> q, k = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss, _, _ = similarity_cross_entropy(q, k, (q * k).sum(1), weight=1 / 8, exclude=Exclude(diagonal=0))
        >>> loss.backward()
    """
    _check(q, k, exclude, scale=scale)
    check.vector("positive", positive, q.shape[0], q, (torch.float32, torch.float64))
    tensor, number = _weights(weight, q.shape[0], q)
    q, k = cast_features(q, k, autocast=autocast)
    mask = wants_grad(q, k, positive, scale)
    loss, row, top, *_ = sum_op.cross_entropy(q, k, positive, tensor, number, *_split(scale), *exclude, decoupled, mask)
    return loss, row, top


def two_view_cross_entropy(
    out0: Tensor,
    out1: Tensor,
    scale: Tensor | float = 1.0,
    *,
    weight: Tensor | float = 1.0,
    decoupled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax cross-entropy between two views: normalisation, loss and all gradients in one call.

        z = l2_normalize(out0, out1)                                     (2N, D)
        lse_i, positive_i = self_similarity_logsumexp(z, scale, Exclude(diagonal=0, period=N), return_positive=True)
        loss = sum_i weight_i softplus(lse_i - positive_i)               (decoupled: weight_i (lse_i - positive_i))

    The sweeps are those of the ops it stands for. It is for batches so small that the calls between them cost more.

    Args:
        out0, out1: the two views, (N, D), of one dtype; not cast under autocast.
        scale: as in `similarity_logsumexp`.
        weight: number or (2N,): constants, without gradient.

    Returns:
        loss (scalar), lse, positives and row maxima (each (2N,)), the last three detached.

    Raises:
        ValueError, TypeError: as in `l2_normalize`; views of two shapes; weight of another shape.

    Example:
        >>> out0, out1 = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
        >>> loss, *_ = two_view_cross_entropy(out0, out1, 2.0, weight=1 / 8)
        >>> loss.backward()
    """
    check.features(out0=out0, out1=out1)
    check.number("scale", scale, out0)
    if out0.shape != out1.shape or out0.dtype != out1.dtype:
        raise ValueError(f"out1 must be {out0.dtype} {tuple(out0.shape)} as out0, got {out1.dtype} {tuple(out1.shape)}")
    tensor, number = _weights(weight, 2 * out0.shape[0], out0)
    mask = wants_grad(out0, out1, scale)
    return sum_op.two_view(out0, out1, tensor, number, *_split(scale), decoupled, mask)[:4]


def similarity_softplus(
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    exclude: Exclude = NOTHING,
    *,
    autocast: bool = True,
) -> Tensor:
    """Row sums of softplus over the similarities: SigLIP's negatives without their matrix.

        row_i = sum_j softplus(scale * <q_i, k_j> + bias)        over the pairs that `exclude` leaves

    Args:
        q, k, scale, exclude: as in `similarity_logsumexp`.
        bias: number, or tensor of one element.

    Returns:
        Row sums, (N,).

    Raises:
        ValueError, TypeError: as in `similarity_logsumexp`.

    Example:
        >>> similarity_softplus(torch.randn(8, 16), torch.randn(8, 16), 10.0, -10.0, Exclude(diagonal=0)).shape
        torch.Size([8])
    """
    _check(q, k, exclude, scale=scale, bias=bias)
    q, k = cast_features(q, k, autocast=autocast)
    return sum_op.softplus(q, k, *_split(scale), *_split(bias), *exclude)


def similarity_softplus_sum(
    q: Tensor,
    k: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    *,
    weight: Tensor | float = 1.0,
    exclude: Exclude = NOTHING,
    autocast: bool = True,
) -> Tensor:
    """sum_i weight_i similarity_softplus(...)_i, a scalar, with all gradients from the one sweep of the forward.

    Args:
        q, k, scale, bias, exclude: as in `similarity_softplus`.
        weight: number or (N,): constants, without gradient.

    Raises:
        ValueError, TypeError: as in `similarity_logsumexp`; weight of another shape.

    Example:
        >>> q = torch.randn(8, 16, requires_grad=True)
        >>> similarity_softplus_sum(q, torch.randn(8, 16), 10.0, -10.0, weight=1 / 8).backward()
    """
    _check(q, k, exclude, scale=scale, bias=bias)
    tensor, number = _weights(weight, q.shape[0], q)
    q, k = cast_features(q, k, autocast=autocast)
    mask = wants_grad(q, k, scale, bias)
    return sum_op.softplus_sum(q, k, tensor, number, *_split(scale), *_split(bias), *exclude, mask)[0]


def sampled_logsumexp(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    scale: Tensor | float = 1.0,
    *,
    mask: Tensor | None = None,
    autocast: bool = True,
) -> Tensor:
    """Log-sum-exp over each query's own sample of the keys; the (N, C, D) gather is not stored.

        lse_i = log sum_c exp(scale * <q_i, k_{indices[i, c]}>)        over the c where mask[i, c] is True

    A key drawn twice counts twice. wav2vec 2.0's distractors and explicit negatives of a query are this op.

    Args:
        q: queries, (N, D).
        k: keys, (M, D).
        indices: (N, C) int64 in [0, M); also where the mask is False.
        mask: (N, C) bool; a row without a sample has -inf and no gradient.

    Returns:
        lse, (N,).

    Raises:
        ValueError, TypeError: as in `similarity_logsumexp`; indices or mask of another shape or dtype; an index outside
            the keys on the CPU (compiled: RuntimeError) or under `check_values`, which otherwise makes its row NaN.

    Example:
        >>> q, k = torch.randn(8, 16), torch.randn(100, 16)
        >>> sampled_logsumexp(q, k, torch.randint(100, (8, 5)), 10.0).shape
        torch.Size([8])
    """
    _check(q, k, NOTHING, scale=scale)
    _check_samples("indices", indices, torch.int64, q, indices)
    if mask is not None:
        _check_samples("mask", mask, torch.bool, q, indices)
    if indices.numel() and check.readable(indices):
        low, high = (int(x) for x in indices.aminmax())
        if low < 0 or high >= k.shape[0]:
            raise ValueError(f"indices must be in [0, {k.shape[0]}), got {low if low < 0 else high}")
    q, k = cast_features(q, k, autocast=autocast)
    return sum_op.sampled(q, k, indices, mask, *_split(scale))


def _check_stack(xs: Sequence[Tensor]) -> None:
    if not xs:
        raise ValueError("xs must hold at least one tensor, got none")
    check.features(**{f"xs[{i}]": x for i, x in enumerate(xs)})
    for i, x in enumerate(xs):
        if x.dtype != xs[0].dtype:
            raise TypeError(f"xs[{i}] must have the dtype of xs[0] ({xs[0].dtype}), got {x.dtype}")


def _check_samples(name: str, x: Any, dtype: torch.dtype, q: Tensor, indices: Any) -> None:
    check.tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.ndim != 2 or x.shape[0] != q.shape[0] or x.shape != indices.shape:
        raise ValueError(f"{name} must have shape ({q.shape[0]}, C), got {tuple(x.shape)}")
    check.same_device(name, x, "q", q)


def _weights(weight: Tensor | float, rows: int, like: Tensor) -> tuple[Tensor | None, float]:
    if isinstance(weight, Tensor) and weight.ndim:
        check.vector("weight", weight, rows, like, (torch.float32, torch.float64))
        return weight.detach(), 1.0
    check.number("weight", weight, like)
    return (weight.detach().expand(rows), 1.0) if isinstance(weight, Tensor) else (None, float(weight))
