# SPDX-License-Identifier: Apache-2.0
"""What soft_cross_entropy and softmax_center refuse: by name, with what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sslkernels import ops

STUDENT, TEACHER, CENTER = torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.zeros(5)
LEAF = torch.randn(4, 3, 5, requires_grad=True)
ROWS = {"student": STUDENT[0], "teacher": TEACHER[0]}

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student is a number": ({"student": 1.0}, TypeError, "student must be a torch.Tensor, got float"),
    "student of integers": ({"student": STUDENT.long()}, TypeError, "student must be float32, float64, bfloat16 or"),
    "student of nothing": ({"student": []}, ValueError, "student must hold at least one view, got none"),
    "student without views": ({"student": STUDENT[:0]}, ValueError, "student must have shape (B, V) or (S, B, V) with"),
    "student without prototypes": ({"student": STUDENT[..., :0]}, ValueError, "with V > 0, got (4, 3, 0)"),
    "student of one dimension": ({"student": [STUDENT[0, 0]]}, ValueError, "student[0] must have shape (B, V) or"),
    "student of four": ({"student": STUDENT[None]}, ValueError, "student must have shape (B, V) or (S, B, V) with V"),
    "a view of other width": (
        {"student": [STUDENT[0], STUDENT[1, :, :4]]},
        ValueError,
        "student[1] must have the (B, V) of student[0] (3, 5), got (3, 4)",
    ),
    "a view of another batch": (
        {"teacher": [TEACHER[0], TEACHER[1:, :2]]},
        ValueError,
        "teacher[1] must have the (B, V) of teacher[0] (3, 5), got (1, 2, 5)",
    ),
    "a view of other dtype": (
        {"student": [STUDENT[0], STUDENT[1].double()]},
        TypeError,
        "student[1] must have the dtype of student[0] (torch.float32), got torch.float64",
    ),
    "a view that is none": ({"teacher": [TEACHER[0], None]}, TypeError, "teacher[1] must be a torch.Tensor, got None"),
    "a view elsewhere": (
        {"student": [STUDENT[0], STUDENT[1].to("meta")]},
        ValueError,
        "student[1] must be on the device of student[0] (cpu), got meta",
    ),
    "teacher elsewhere": ({"teacher": TEACHER.to("meta")}, ValueError, "teacher must be on the device of student"),
    "teacher of bytes": ({"teacher": TEACHER.byte()}, TypeError, "teacher must be float32, float64, bfloat16"),
    "teacher of another batch": (
        {"teacher": TEACHER[:, :2]},
        ValueError,
        "teacher must have the samples and prototypes of student, (3, 5), got (2, 5)",
    ),
    "rows and views": (
        {"student": STUDENT[0]},
        ValueError,
        "student and teacher must both be (N, V) or both have views, got (3, 5) and (2, 3, 5)",
    ),
    "views and rows": (
        {"student": [STUDENT[0]], "teacher": TEACHER[0]},
        ValueError,
        "both be (N, V) or both have views, got 1 tensors and (3, 5)",
    ),
    "one view of each": (
        {"student": STUDENT[:1], "teacher": TEACHER[:1]},
        ValueError,
        "student and teacher must leave a pair of different views, got one view of each",
    ),
    "center is a number": ({"center": 0.0}, TypeError, "center must be a torch.Tensor, got float"),
    "center of other width": ({"center": CENTER[:4]}, ValueError, "center must have shape (5,) or (2, 5), got (4,)"),
    "center of three views": ({"center": torch.zeros(3, 5)}, ValueError, "must have shape (5,) or (2, 5), got (3, 5)"),
    "centers of rows": ({**ROWS, "center": torch.zeros(2, 5)}, ValueError, "center must have shape (5,), got (2, 5)"),
    "center elsewhere": ({"center": CENTER.to("meta")}, ValueError, "center must be on the device of teacher"),
    "center of integers": ({"center": CENTER.long()}, TypeError, "center must be float32, float64, bfloat16"),
    "weights of views": ({"row_weight": torch.ones(4)}, ValueError, "row_weight must have shape (3,), got (4,)"),
    "weights of integers": ({"row_weight": torch.ones(3).int()}, TypeError, "row_weight must be one of torch.float32"),
    "weights elsewhere": ({"row_weight": torch.ones(3, device="meta")}, ValueError, "row_weight must be on cpu, got"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    "student_temp zero": ({"student_temp": 0.0}, ValueError, "student_temp must be positive and finite, got 0.0"),
    "teacher_temp NaN": ({"teacher_temp": float("nan")}, ValueError, "teacher_temp must be positive and finite"),
    "teacher_temp a tensor": ({"teacher_temp": torch.tensor(0.1)}, TypeError, "teacher_temp must be a number, got"),
    "in place by rows": (
        {"inplace": True, "reduction": "none"},
        ValueError,
        'inplace must be False for reduction="none", whose gradient is not known in the forward',
    ),
    "in place of a leaf": (
        {"inplace": True, "student": LEAF},
        ValueError,
        "inplace needs logits that a layer has made, but student is a leaf that requires grad",
    ),
    "in place of expanded logits": (
        {"inplace": True, "student": (LEAF[:1] * 1).expand(4, -1, -1)},
        ValueError,
        "inplace needs logits with memory of their own, but student overlaps in memory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    changed, error, message = REFUSED[case]
    arguments: dict[str, Any] = {"student": STUDENT, "teacher": TEACHER, "center": CENTER, **changed}
    with pytest.raises(error, match=re.escape(message)):
        ops.soft_cross_entropy(**arguments)


def test_in_place_of_one_tensor_twice() -> None:
    logits = LEAF[0] * 1
    with pytest.raises(ValueError, match=re.escape("but student[1] overlaps in memory")):
        ops.soft_cross_entropy([logits, logits], TEACHER, inplace=True)


def test_in_place_of_what_the_teacher_reads() -> None:
    logits = LEAF * 1
    with pytest.raises(ValueError, match="but student overlaps in memory"):
        ops.soft_cross_entropy(logits, logits.detach()[:2], inplace=True)
    ops.soft_cross_entropy(logits[:2], logits.detach()[2:], inplace=True).backward()  # beside it


REFUSED_TEACHER: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logits is a list": ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
    "logits of integers": ({"logits": TEACHER.long()}, TypeError, "logits must be float32, float64, bfloat16 or"),
    "a number": ({"logits": torch.tensor(1.0)}, ValueError, "logits must have shape (..., V) with V > 0, got ()"),
    "without prototypes": ({"logits": TEACHER[..., :0]}, ValueError, "with V > 0, got (2, 3, 0)"),
    "center of views": ({"center": torch.zeros(2, 5)}, ValueError, "center must have shape (5,), got (2, 5)"),
    "center of other width": ({"center": torch.zeros(4)}, ValueError, "center must have shape (5,), got (4,)"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
    "temperature a tensor": ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
}


@pytest.mark.parametrize("case", REFUSED_TEACHER)
def test_teacher_refused_by_name(case: str) -> None:
    changed, error, message = REFUSED_TEACHER[case]
    with pytest.raises(error, match=re.escape(message)):
        ops.softmax_center(**{"logits": TEACHER, "center": CENTER, **changed})


def test_fakes_are_checked() -> None:
    student, teacher, center = (x.to("meta") for x in (STUDENT, TEACHER, CENTER))
    loss, mean = ops.soft_cross_entropy(student, teacher, center, return_center=True)
    assert loss.shape == () and mean.shape == (5,) and loss.device.type == "meta"
    assert ops.soft_cross_entropy(student, teacher, reduction="none").shape == (4, 3)
    assert ops.softmax_center(teacher)[0].shape == (2, 3, 5)
    with pytest.raises(ValueError, match="teacher must have the samples"):
        ops.soft_cross_entropy(student, teacher[:, :1])
