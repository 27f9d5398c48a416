# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/methods.md run as they stand there, but for the number of steps."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from sslkernels import data
from sslkernels.methods import SimCLR
from sslkernels.nn import GlobalBatchNorm, ResidualCNN

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def examples():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_training_example():
    code = examples()[0]
    assert len(code.splitlines()) <= 17
    names = {"images": data.photographs(size=16, train_crops=4, test_crops=1).train_images}
    exec(code.replace("range(200)", "range(2)"), names)
    assert names["features"].shape == (64, 128)
    assert names["loss"].isfinite() and set(names["metrics"]) >= {"loss", "top1", "positive", "hardest_negative"}
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in names["metrics"].values())


def test_example_of_several_processes():
    names = {"SimCLR": SimCLR, "backbone": ResidualCNN(in_chans=1), "torch": torch}
    # one process has no group to average over
    names |= {"DistributedDataParallel": nn.Sequential, "own_part_of_the_batch": tuple(torch.rand(2, 4, 1, 8, 8))}
    exec(examples()[1], names)
    assert names["loss"].isfinite()
    assert any(isinstance(part, GlobalBatchNorm) for part in names["method"].modules())
