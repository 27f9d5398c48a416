# SPDX-License-Identifier: Apache-2.0
"""What linear_soft_cross_entropy refuses: by name, with what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sslkernels import ops

STUDENT, WEIGHT, TEACHER, LAYER = torch.randn(3, 4, 5), torch.randn(9, 5), torch.randn(2, 4, 5), torch.randn(9, 5)
ROWS = {"student": STUDENT[0], "teacher": TEACHER[0]}

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student is a number": ({"student": 1.0}, TypeError, "student must be a torch.Tensor, got float"),
    "student of integers": ({"student": STUDENT.long()}, TypeError, "student must be float32, float64, bfloat16 or"),
    "student of four dimensions": (
        {"student": STUDENT[None]},
        ValueError,
        "student must have shape (B, D) or (S, B, D)",
    ),
    "student without views": ({"student": []}, ValueError, "student must hold at least one view, got none"),
    "student of no view": ({"student": STUDENT[:0]}, ValueError, "student must have shape (B, D) or (S, B, D)"),
    "student without features": ({"student": STUDENT[..., :0]}, ValueError, "with D > 0, got (3, 4, 0)"),
    "views unlike the first": (
        {"student": [STUDENT[0], STUDENT[1, :2]]},
        ValueError,
        "student[1] must have the (B, D) of student[0] (4, 5), got (2, 5)",
    ),
    "a view elsewhere": (
        {"student": [STUDENT[0], STUDENT[1].to("meta")]},
        ValueError,
        "student[1] must be on the device of student[0] (cpu), got meta",
    ),
    "rows against views": (
        {"student": STUDENT[0]},
        ValueError,
        "student and teacher must both be (N, D) or both have views, got (4, 5) and (2, 4, 5)",
    ),
    "teacher of other samples": (
        {"teacher": TEACHER[:, :3]},
        ValueError,
        "teacher must have the samples of student, 4",
    ),
    "teacher elsewhere": (
        {"teacher": TEACHER.to("meta")},
        ValueError,
        "teacher must be on the device of student (cpu)",
    ),
    "one view of each": (
        {"student": STUDENT[:1], "teacher": TEACHER[:1]},
        ValueError,
        "student and teacher must leave a pair of different views",
    ),
    "weight is missing": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "weight of other width": (
        {"weight": WEIGHT[:, :4]},
        ValueError,
        "weight must have shape (V, 5) with V > 0, got (9, 4)",
    ),
    "weight transposed": ({"weight": WEIGHT.T}, ValueError, "weight must have shape (V, 5) with V > 0, got (5, 9)"),
    "no prototypes": ({"weight": WEIGHT[:0]}, ValueError, "weight must have shape (V, 5) with V > 0, got (0, 5)"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on the device of student (cpu)"),
    "teacher_weight of other width": (
        {"teacher_weight": LAYER[:, :4]},
        ValueError,
        "teacher_weight must have shape (V, 5)",
    ),
    "teacher_weight of other count": (
        {"teacher_weight": LAYER[:8]},
        ValueError,
        "teacher_weight must have as many prototypes as weight (9), got 8",
    ),
    "teacher of other width": (
        {"teacher": TEACHER[..., :4], "teacher_weight": None},
        ValueError,
        "teacher must have as many features as weight (5), got 4",
    ),
    "center of other width": (
        {"center": torch.zeros(8)},
        ValueError,
        "center must have shape (9,) or (2, 9), got (8,)",
    ),
    "center of other views": (
        {"center": torch.zeros(3, 9)},
        ValueError,
        "center must have shape (9,) or (2, 9), got (3, 9)",
    ),
    "center of integers": (
        {"center": torch.zeros(9).long()},
        TypeError,
        "center must be float32, float64, bfloat16 or",
    ),
    "row_weight a view": ({"row_weight": torch.ones(3, 4)}, ValueError, "row_weight must have shape (4,), got (3, 4)"),
    "row_weight of bools": ({"row_weight": torch.ones(4).bool()}, TypeError, "row_weight must be one of torch.float32"),
    "teacher_temp a tensor": (
        {"teacher_temp": torch.tensor(0.1)},
        TypeError,
        "teacher_temp must be a number, got Tensor",
    ),
    "student_temp zero": ({"student_temp": 0.0}, ValueError, "student_temp must be positive and finite, got 0.0"),
    "teacher_temp negative": ({"teacher_temp": -1}, ValueError, "teacher_temp must be positive and finite, got -1"),
    "reduction none": ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum', got 'none'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    changes, error, message = REFUSED[name]
    arguments = {"student": STUDENT, "weight": WEIGHT, "teacher": TEACHER, "teacher_weight": LAYER} | changes
    with pytest.raises(error, match=re.escape(message)):
        ops.linear_soft_cross_entropy(**arguments)


def test_what_is_refused_elsewhere_is_fine_here() -> None:
    ops.linear_soft_cross_entropy(**ROWS, weight=WEIGHT)
    ops.linear_soft_cross_entropy(STUDENT[:1], WEIGHT, TEACHER[:1], exclude_same_view=False)
    ops.linear_soft_cross_entropy(STUDENT, WEIGHT, TEACHER[..., :4], LAYER[:, :4], torch.zeros(1, 1, 9))
