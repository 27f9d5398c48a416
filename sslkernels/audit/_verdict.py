# SPDX-License-Identifier: Apache-2.0
"""What the numbers of an audit say, in words."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.audit._measure import Gradients, Measured, Step

NEGLIGIBLE = 1e-6  # share of the whole gradient below which that of a parameter is rounding


class Finding(NamedTuple):
    """One configuration. sizes: rows of each rank; loss and true_loss: mean over the ranks, and of one process.

    cosine and ratio (of the norms): of the averaged gradient to the true one, of that parameter which is worst;
    features_cosine: the same of all ranks' features. nan where a rank stopped.
    """

    sizes: tuple[int, ...]
    loss: float
    true_loss: float
    cosine: float
    ratio: float
    features_cosine: float
    parameter: str
    verdict: str

    @property
    def exact(self) -> bool:
        return self.verdict == EXACT


EXACT = "exact"


class _Likeness(NamedTuple):
    error: float
    cosine: float
    ratio: float
    name: str


def _alike(found: Tensor, true: Tensor, name: str, floor: float) -> _Likeness:
    norm, true_norm = float(found.norm()), float(true.norm())
    error = float((found - true).norm()) / (max(true_norm, floor) or 1.0)
    if true_norm <= floor:
        return _Likeness(error, math.nan if error else 1.0, math.nan if error else 1.0, name)
    cosine = float((found * true).sum()) / (norm * true_norm) if norm else 0.0
    return _Likeness(error, cosine, norm / true_norm, name)


def _compare(found: Gradients, true: Gradients) -> list[_Likeness]:
    """Parameter by parameter, the worst first; without a gradient is with one of zero."""
    floor = NEGLIGIBLE * math.hypot(*(float(x.norm()) for x in true.values()))
    zeros = {name: torch.zeros_like(x) for name, x in (true | found).items()}
    everything = [
        _alike(found.get(name, zero), true.get(name, zero), name.removeprefix("encoder."), floor)
        for name, zero in zeros.items()
    ]
    return sorted(everything, key=lambda likeness: -likeness.error if likeness.error == likeness.error else -math.inf)


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(b), 1e-12)


def find(measured: Measured, tolerance: float) -> Finding:
    """The first step that is not exact, or else the first, as a finding."""
    findings = [_find(measured, i, tolerance) for i in range(len(measured.true))]
    return next((f for f in findings if not f.exact), findings[0])


def _find(measured: Measured, index: int, tolerance: float) -> Finding:
    true, together = measured.true[index], measured.together[index]
    likeness = _compare(together.gradients, true.gradients)
    worst = likeness[0]
    features = _alike(together.features, true.features, "features", 0.0)
    verdict = _words(measured, index, likeness, features, tolerance)
    return Finding(
        tuple(measured.sizes), together.loss, true.loss, worst.cosine, worst.ratio, features.cosine, worst.name, verdict
    )


def _words(measured: Measured, index: int, likeness: list[_Likeness], features: _Likeness, tolerance: float) -> str:
    true, together = measured.true[index], measured.together[index]
    value = _close(together.loss, true.loss, tolerance)
    gradient = all(x.error <= tolerance for x in [*likeness, features])
    if value and gradient:
        return EXACT
    if measured.own and _is(together, measured.own[index][0], tolerance):
        if _close(measured.own[index][1], true.loss, tolerance):
            return "ranks count equally, not their rows: weight each rank's loss by world * its rows / all rows"
        return "not synchronised: each rank computes the loss of its own batch"
    words = []
    if not value:
        words.append(f"the loss is {_share(together.loss / true.loss, len(measured.sizes), tolerance)} the true one")
    words.append(_of_gradient(measured, likeness, features, value, gradient, tolerance))
    return "; ".join(words)


def _is(step: Step, other: Step, tolerance: float) -> bool:
    if not _close(step.loss, other.loss, tolerance):
        return False
    return all(x.error <= tolerance for x in _compare(step.gradients, other.gradients))


def _of_gradient(
    measured: Measured, likeness: list[_Likeness], features: _Likeness, value: bool, gradient: bool, tolerance: float
) -> str:
    if gradient:
        return "the gradient is exact"
    worst, world = likeness[0] if likeness[0].error > tolerance else features, len(measured.sizes)
    right = [x.name for x in likeness if x.error <= tolerance]
    subject = f"the gradient of {worst.name}" if right else "the gradient"
    if worst.cosine >= 1 - tolerance:
        share = _share(worst.ratio, world, tolerance)
        advice = {
            f"1/{world} of": f" (1/world): multiply the loss by {world}",
            f"{world} times": f" (world): divide the loss by {world}",
        }.get(share, "")
        if advice and right:  # no factor of the loss mends one and leaves the other
            advice = advice.split(":")[0] + f", that of {right[0]} is exact: let gathered rows have their gradient"
        return f"{subject} is {share} the true one{advice}"
    if not math.isfinite(worst.error):
        return f"{subject} is not finite"
    if worst.cosine != worst.cosine:
        return f"{subject} should be zero"
    cause = ""
    if value and not measured.travels:
        cause = ": the rows of other ranks are used without a gradient to them (the key side is missing)"
    elif not value:
        cause = ": some of it, such as statistics or negatives, is of the rank's own batch"
    return f"{subject} has a wrong direction (cosine {worst.cosine:.3f}){cause}"


def _share(ratio: float, world: int, tolerance: float) -> str:
    if _close(ratio, 1 / world, tolerance):
        return f"1/{world} of"
    if _close(ratio, world, tolerance):
        return f"{world} times"
    return f"{ratio:.4g} of"
