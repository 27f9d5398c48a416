# SPDX-License-Identifier: Apache-2.0
"""What masked_regression and average_layers refuse: by name, with what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels import ops

PRED, TARGET, IDS = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 5), torch.randint(7, (2, 3, 4))
LIKE_PRED, MASK = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4) < 0.5
WHOLE = {"target": LIKE_PRED, "ids": None}
LAYER = torch.randn(2, 7, 5)


def outside(value: int) -> Tensor:
    ids = IDS.clone()
    ids[1, 2, 3] = value
    return ids


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pred is a list": ({"pred": [1.0]}, TypeError, "pred must be a torch.Tensor, got list"),
    "pred of integers": ({"pred": PRED.long()}, TypeError, "pred must be float32, float64, bfloat16 or float16, got"),
    "pred without rows": ({"pred": torch.tensor(1.0), **WHOLE}, ValueError, "pred must have shape (..., D) with D > 0"),
    "pred without features": ({"pred": PRED[..., :0], **WHOLE}, ValueError, "with D > 0, got (2, 3, 4, 0)"),
    "target of bytes": ({"target": TARGET.byte()}, TypeError, "target must be float32, float64, bfloat16 or float16"),
    "target elsewhere": ({"target": TARGET.to("meta")}, ValueError, "target must be on the device of pred (cpu)"),
    "target of other width": (
        {"target": TARGET[..., :4]},
        ValueError,
        "target must have shape (B, L, 5) with ids, got",
    ),
    "target without batch": (
        {"target": TARGET[0]},
        ValueError,
        "target must have shape (B, L, 5) with ids, got (7, 5)",
    ),
    "target of other shape": ({"ids": None}, ValueError, "target must have the shape of pred (2, 3, 4, 5) without ids"),
    "ids of 32 bits": ({"ids": IDS.int()}, TypeError, "ids must be torch.int64, got torch.int32"),
    "ids of another batch": ({"ids": IDS[:1]}, ValueError, "ids must have shape (2, K) or (2, M, K), got (1, 3, 4)"),
    "ids of one sample": ({"ids": IDS[0, 0]}, ValueError, "ids must have shape (2, K) or (2, M, K), got (4,)"),
    "ids unlike pred": (
        {"ids": IDS[:, :, :3]},
        ValueError,
        "pred must have shape (2, 3, 3, 5), as ids, got (2, 3, 4, 5)",
    ),
    "ids elsewhere": ({"ids": IDS.to("meta")}, ValueError, "ids must be on the device of pred (cpu), got meta"),
    "id too large": ({"ids": outside(7)}, ValueError, "ids must be in [0, 7), got 7"),
    "id negative": ({"ids": outside(-1)}, ValueError, "ids must be in [0, 7), got -1"),
    "ids into nothing": ({"target": TARGET[:, :0]}, ValueError, "ids must be in [0, 0), got"),
    "ids and mask": ({"mask": MASK}, ValueError, "mask must not be given together with ids"),
    "mask of integers": ({**WHOLE, "mask": MASK.long()}, TypeError, "mask must be torch.bool, got torch.int64"),
    "mask of other shape": ({**WHOLE, "mask": MASK[0]}, ValueError, "mask must have shape (2, 3, 4), got (3, 4)"),
    "mask elsewhere": ({**WHOLE, "mask": MASK.to("meta")}, ValueError, "mask must be on the device of pred (cpu)"),
    "loss": ({"loss": "huber"}, ValueError, "loss must be one of 'smooth_l1', 'l1', 'l2', 'cosine', 'normalized_l2'"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    "beta negative": ({"beta": -1.0}, ValueError, "beta must be in [0.0, inf), got -1.0"),
    "beta NaN": ({"beta": float("nan")}, ValueError, "beta must be in [0.0, inf), got nan"),
    "eps zero": ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    "scale a tensor": ({"scale": torch.tensor(2.0)}, TypeError, "scale must be a number, got Tensor"),
    "normalised twice": (
        {"loss": "cosine", "normalize_target": True},
        ValueError,
        "normalize_target must be False for loss='cosine', which normalises to unit length itself",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    changed, error, message = REFUSED[case]
    arguments: dict[str, Any] = {"pred": PRED, "target": TARGET, "ids": IDS, **changed}
    with pytest.raises(error, match=re.escape(message)):
        ops.masked_regression(**arguments)


REFUSED_LAYERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "none": (lambda: ops.average_layers([]), ValueError, "layers must hold at least one tensor, got none"),
    "not a tensor": (lambda: ops.average_layers([LAYER, 3]), TypeError, "layers[1] must be a torch.Tensor, got int"),  # type: ignore[list-item]
    "integers": (lambda: ops.average_layers([LAYER.int()]), TypeError, "layers[0] must be float32, float64"),
    "two dimensions": (lambda: ops.average_layers([LAYER[0]]), ValueError, "layers[0] must have shape (B, L, D), got"),
    "other shape": (
        lambda: ops.average_layers([LAYER, LAYER[:, 1:]]),
        ValueError,
        "layers[1] must have shape (2, 7, 5) as layers[0], got (2, 6, 5)",
    ),
    "elsewhere": (lambda: ops.average_layers([LAYER, LAYER.to("meta")]), ValueError, "layers[1] must be on the device"),
    "one row": (lambda: ops.average_layers([LAYER[:, :1]]), ValueError, "more than one row for instance_norm, got"),
    "eps": (lambda: ops.average_layers([LAYER], eps=-1.0), ValueError, "eps must be positive and finite, got -1.0"),
}


@pytest.mark.parametrize("case", REFUSED_LAYERS)
def test_layers_refused_by_name(case: str) -> None:
    call, error, message = REFUSED_LAYERS[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("bad", [-1, 7])
def test_the_kernel_itself_refuses_an_id_outside(bad: int) -> None:
    """What a compiled graph meets, where nobody reads values before."""
    options = ("l2", 1.0, False, 1e-5)
    ids = outside(bad)
    for call in (
        lambda: torch.ops.sslkernels.masked_regression(PRED, TARGET, ids, *options, 1.0, True, True),
        lambda: torch.ops.sslkernels.masked_regression_rows(PRED, TARGET, ids, *options),
        lambda: torch.ops.sslkernels.masked_regression_rows_backward(MASK.float(), PRED, TARGET, ids, *options),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"ids must be in [0, 7), got {bad}")):
            call()


def test_fakes_are_checked_but_for_their_values() -> None:
    meta = [x.to("meta") for x in (PRED, TARGET, IDS)]
    assert ops.masked_regression(*meta, reduction="none").shape == (2, 3, 4)
    with pytest.raises(ValueError, match="pred must have shape"):
        ops.masked_regression(meta[0][:, :2], *meta[1:])
