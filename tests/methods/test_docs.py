# SPDX-License-Identifier: Apache-2.0
"""The example of docs/methods.md runs as it stands there, but for the number of steps."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sslkernels import data

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_training_example():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 17
    names = {"images": data.photographs(size=16, train_crops=4, test_crops=1).train_images}
    exec(code.replace("range(200)", "range(2)"), names)
    assert names["features"].shape == (64, 128)
    assert names["loss"].isfinite() and set(names["metrics"]) >= {"loss", "top1", "positive", "hardest_negative"}
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in names["metrics"].values())
