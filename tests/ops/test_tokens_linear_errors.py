# SPDX-License-Identifier: Apache-2.0
"""What linear_cross_entropy refuses: by name, with what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sslkernels import ops

INPUT, WEIGHT, BIAS, TARGET = torch.randn(2, 4, 5), torch.randn(9, 5), torch.randn(9), torch.randint(9, (2, 4))
ABOVE, BELOW = TARGET.clone(), TARGET.clone()
ABOVE[1, 2], BELOW[0, 3] = 9, -1

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input is a number": ({"input": 1.0}, TypeError, "input must be a torch.Tensor, got float"),
    "input of integers": ({"input": INPUT.long()}, TypeError, "input must be float32, float64, bfloat16 or float16"),
    "input without dimensions": ({"input": INPUT[0, 0, 0]}, ValueError, "input must have shape (..., D) with D > 0"),
    "input without features": ({"input": INPUT[..., :0]}, ValueError, "with D > 0, got (2, 4, 0)"),
    "weight is missing": ({"linear_weight": None}, TypeError, "linear_weight must be a torch.Tensor, got NoneType"),
    "weight of other width": (
        {"linear_weight": WEIGHT[:, :4]},
        ValueError,
        "linear_weight must have shape (V, 5) with V > 0, got (9, 4)",
    ),
    "weight transposed": ({"linear_weight": WEIGHT.T}, ValueError, "linear_weight must have shape (V, 5) with V > 0"),
    "no classes": ({"linear_weight": WEIGHT[:0]}, ValueError, "with V > 0, got (0, 5)"),
    "weight elsewhere": (
        {"linear_weight": WEIGHT.to("meta")},
        ValueError,
        "linear_weight must be on the device of input (cpu), got meta",
    ),
    "target of probabilities": ({"target": torch.rand(2, 4)}, TypeError, "target must be int64 class indices, got"),
    "target of int32": ({"target": TARGET.int()}, TypeError, "target must be int64 class indices, got torch.int32"),
    "target flat": ({"target": TARGET.flatten()}, ValueError, "target must have shape (2, 4), got (8,)"),
    "target elsewhere": ({"target": TARGET.to("meta")}, ValueError, "target must be on the device of input (cpu)"),
    "target too large": ({"target": ABOVE}, ValueError, "target must be in [0, 9) or -100, which is ignored, got 9"),
    "target negative": ({"target": BELOW}, ValueError, "target must be in [0, 9) or -100, which is ignored, got -1"),
    "bias of other width": ({"linear_bias": BIAS[:8]}, ValueError, "linear_bias must have shape (9,), got (8,)"),
    "bias of integers": ({"linear_bias": BIAS.long()}, TypeError, "linear_bias must be one of torch.float32"),
    "no such reduction": (
        {"reduction": "max"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    "ignore_index None": ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
    "label_smoothing one": ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be in [0, 1), got 1.0"),
    "z_loss negative": ({"z_loss": -1e-4}, ValueError, "z_loss must be in [0, inf), got -0.0001"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    changes, error, message = REFUSED[name]
    arguments = {"input": INPUT, "linear_weight": WEIGHT, "target": TARGET, "linear_bias": BIAS} | changes
    with pytest.raises(error, match=re.escape(message)):
        ops.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_cross_entropy_rows"])
def test_the_kernel_looks_at_targets_before_it_reads_by_them(op: str) -> None:
    """Compiled code cannot look at values when it is traced."""
    rest = (True, 0, [True] * 3) if op == "linear_cross_entropy" else ()
    with pytest.raises(RuntimeError, match=re.escape("target must be in [0, 9) or -100, got 9")):
        getattr(torch.ops.sslkernels, op)(INPUT.view(8, 5), WEIGHT, BIAS, ABOVE.view(8), -100, 0.0, 0.0, *rest)
