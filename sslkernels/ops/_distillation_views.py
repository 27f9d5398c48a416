# SPDX-License-Identifier: Apache-2.0
"""What the soft cross-entropies take: views of samples, a centre, weights of samples, temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sslkernels import _checks as check

Views = Tensor | Sequence[Tensor]


def two_sides(student: Any, teacher: Any, width: str) -> tuple[list[Tensor], list[Tensor], bool]:
    """The views of both, and whether they are none: bare rows, (N, V) or, where `width` is D, (N, D)."""
    rows_only = isinstance(student, Tensor) and student.ndim == 2
    if rows_only != (isinstance(teacher, Tensor) and teacher.ndim == 2):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else f"{len(x)} tensors" for x in (student, teacher)]
        raise ValueError(
            f"student and teacher must both be (N, {width}) or both have views, got {shapes[0]} and {shapes[1]}"
        )
    s, t = _views("student", student, width), _views("teacher", teacher, width)
    check.same_device("teacher", t[0], "student", s[0])
    return s, t, rows_only


def _views(name: str, x: Any, width: str) -> list[Tensor]:
    several = isinstance(x, list | tuple)
    if several and not x:
        raise ValueError(f"{name} must hold at least one view, got none")
    xs = list(x) if several else [x]
    for i, view in enumerate(xs):
        label = f"{name}[{i}]" if several else name
        check.floating(label, view)
        if view.ndim not in (2, 3) or view.shape[-1] == 0 or view.shape[0 : view.ndim - 2] == (0,):
            shapes = f"(B, {width}) or (S, B, {width}) with {width} > 0"
            raise ValueError(f"{label} must have shape {shapes}, got {tuple(view.shape)}")
        if view.shape[-2:] != xs[0].shape[-2:]:
            expected = f"the (B, {width}) of {name}[0] {tuple(xs[0].shape[-2:])}"
            raise ValueError(f"{label} must have {expected}, got {tuple(view.shape)}")
        check.same_device(label, view, f"{name}[0]", xs[0])
    return xs


def count(xs: Sequence[Tensor]) -> int:
    """Views in (B, V) and (S, B, V)."""
    return sum(x.shape[0] if x.ndim == 3 else 1 for x in xs)


def excluding(exclude_same_view: bool, rows_only: bool, s: Sequence[Tensor], t: Sequence[Tensor]) -> bool:
    """Whether view i of the student does not meet view i of the teacher; some pair must be left."""
    exclude = exclude_same_view and not rows_only
    if exclude and count(s) == count(t) == 1:
        raise ValueError("student and teacher must leave a pair of different views, got one view of each")
    return exclude


def centers(center: Any, width: int, like: Tensor, views: int) -> Tensor | None:
    """(1, V), or (T, V) if each teacher view has its own."""
    if center is None:
        return None
    check.floating("center", center)
    check.same_device("center", center, "teacher", like)
    if center.shape[-1:] != (width,) or center.numel() not in (width, views * width):
        expected = f"({width},)" + (f" or ({views}, {width})" if views > 1 else "")
        raise ValueError(f"center must have shape {expected}, got {tuple(center.shape)}")
    return center.detach().reshape(-1, width)


def sample_weights(row_weight: Any, like: Tensor) -> Tensor | None:
    """(B,), constant; `like` is a view."""
    if row_weight is None:
        return None
    check.vector("row_weight", row_weight, like.shape[-2], like, check.FLOATS)
    return row_weight.detach()


def temperatures(**numbers: Any) -> tuple[float, ...]:
    for name, x in numbers.items():
        check.positive(name, x)
    return tuple(float(x) for x in numbers.values())
