# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn-Knopp on potentials, in the log domain: codes that balance the prototypes, or only the centre they need."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels.ops._registry import define
from sslkernels.reference import _distillation_sinkhorn as reference
from sslkernels.reference._precision import compute_dtype

_ARGUMENTS = "(Tensor scores, int iterations, float epsilon) -> Tensor"
_codes = define(
    f"sinkhorn_knopp{_ARGUMENTS}",
    reference=reference.sinkhorn_knopp,
    fake=lambda scores, *options: scores.new_empty(scores.shape, dtype=compute_dtype(scores)),
)
_center = define(
    f"sinkhorn_center{_ARGUMENTS}",
    reference=reference.sinkhorn_center,
    fake=lambda scores, *options: _fake_center(scores),
)
_sweep = define(
    "sinkhorn_sweep(Tensor scores, Tensor? center, float epsilon) -> Tensor",
    reference=reference.sinkhorn_sweep,
    fake=lambda scores, *options: _fake_center(scores),
)


def _fake_center(scores: Tensor) -> Tensor:
    return scores.new_empty((*scores.shape[:-2], scores.shape[-1]), dtype=compute_dtype(scores))


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """Soft codes of samples over prototypes that use all prototypes alike. No gradient.

        Q = exp(scores / epsilon)
        repeat `iterations` times:
            Q_bk = Q_bk / (K sum_b Q_bk)        each prototype gets the same
            Q_bk = Q_bk / (B sum_k Q_bk)        each sample gives the same
        codes = B Q                             a row sums to 1; a column to about B / K

    These are the values of the originals' exponential form (three iterations are not converged, and so depend on the
    order of the steps) wherever that is finite; it overflows above a score of 88 epsilon and divides by zero where no
    sample is near a prototype. Here only one number a prototype and one a sample change: codes = softmax((scores - c) /
    epsilon), with c as in `sinkhorn_center`. Each iteration reads the scores once, and stores nothing of their size.

    Args:
        scores: (B, K), or (T, B, K) for T views, each on its own.
        iterations: at least 1.
        epsilon: temperature, above 0.

    Returns:
        Codes of the shape of scores in float32, float64 if scores is. One NaN or +inf among the scores of a view makes
        all its codes NaN, as does a prototype or (with two iterations or more) a sample whose scores are all -inf.

    Raises:
        ValueError, TypeError: other shapes, an empty batch, no prototypes, a dtype that is not floating; iterations or
            epsilon out of range.

    Example:
        >>> codes = sinkhorn_knopp(torch.randn(8, 16), epsilon=0.5)
        >>> torch.allclose(codes.sum(1), torch.ones(8))
        True

    Source: SwAV `main_swav.py::distributed_sinkhorn`; DINOv2 `loss/dino_clstoken_loss.py::sinkhorn_knopp_teacher`.
    """
    _check(scores, iterations, epsilon)
    return _codes(scores, iterations, float(epsilon))


@torch.no_grad()
def sinkhorn_center(scores: Tensor, iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """The centre c with which softmax((scores - c) / epsilon) are the codes of `sinkhorn_knopp`. No gradient.

        c_k = epsilon log(K/B sum_b exp(scores_bk / epsilon))
        repeat `iterations - 1` times:
            p   = softmax((scores - c) / epsilon)           over the prototypes
            c_k = c_k + epsilon log(K/B sum_b p_bk)         until each prototype has B/K of the samples

    So Sinkhorn is centring with another centre than the mean, and whatever takes a centre needs no codes:
    `soft_cross_entropy(student, teacher, sinkhorn_center(teacher, epsilon=t), teacher_temp=t)`. A number added to all
    of c changes nothing.

    Args:
        scores, iterations, epsilon: as in `sinkhorn_knopp`.

    Returns:
        (K,), or (T, K), in float32, float64 if scores is.

    Raises:
        ValueError, TypeError: as `sinkhorn_knopp`.

    Example:
        >>> scores = torch.randn(8, 16)
        >>> c = sinkhorn_center(scores, epsilon=0.5)
        >>> torch.allclose(((scores - c) / 0.5).softmax(1), sinkhorn_knopp(scores, epsilon=0.5), atol=1e-6)
        True

    Source: as `sinkhorn_knopp`, with u = exp(-c / epsilon) the scaling of the prototypes.
    """
    _check(scores, iterations, epsilon)
    return _center(scores, iterations, float(epsilon))


@torch.no_grad()
def sinkhorn_sweep(scores: Tensor, center: Tensor | None = None, epsilon: float = 0.05) -> Tensor:
    """What one iteration of `sinkhorn_center` reads off the scores, times epsilon. No gradient.

        epsilon log sum_b exp(scores_bk / epsilon)                  without a center
        epsilon log sum_b softmax((scores - center) / epsilon)_bk   with one

    So c = sweep + epsilon log(K/B), then c = c + sweep + epsilon log(K/B): for samples in several places, whose sums
    are added between the sweeps.

    Args:
        scores: (B, K), or (T, B, K) for T views, each on its own; B may be 0.
        center: (K,), or (T, K); the previous iteration's, of all samples.
        epsilon: as in `sinkhorn_knopp`.

    Returns:
        (K,), or (T, K), in float32, float64 if scores is; -inf without samples, or where all scores are -inf. With a
        center and in float32, a sum below 1e-23 B is known to be small, no more. NaN and +inf are NaN, with a center in
        their whole view.

    Raises:
        ValueError, TypeError: other shapes, no prototypes, dtypes or devices other than above; epsilon out of range.

    Example:
        >>> scores = torch.randn(8, 16)
        >>> parts = torch.stack([sinkhorn_sweep(half) for half in scores.split(4)])
        >>> torch.allclose((parts / 0.05).logsumexp(0) * 0.05, sinkhorn_sweep(scores))
        True

    Source: as `sinkhorn_knopp`.
    """
    _check_scores(scores)
    if 0 in (*scores.shape[:-2], scores.shape[-1]):
        raise ValueError(f"scores must have prototypes, got shape {tuple(scores.shape)}")
    check.positive("epsilon", epsilon)
    if center is not None:
        check.floating("center", center)
        check.same_device("center", center, "scores", scores)
        expected = (*scores.shape[:-2], scores.shape[-1])
        if center.shape != expected:
            raise ValueError(f"center must have shape {expected}, got {tuple(center.shape)}")
        center = center.to(compute_dtype(scores)).contiguous()
    return _sweep(scores, center, float(epsilon))


def _check(scores: Tensor, iterations: int, epsilon: float) -> None:
    _check_scores(scores)
    if 0 in scores.shape:
        raise ValueError(f"scores must have samples and prototypes, got shape {tuple(scores.shape)}")
    check.integer("iterations", iterations, 1)
    check.positive("epsilon", epsilon)


def _check_scores(scores: Tensor) -> None:
    check.floating("scores", scores)
    if scores.ndim not in (2, 3):
        raise ValueError(f"scores must have shape (B, K) or (T, B, K), got {tuple(scores.shape)}")
