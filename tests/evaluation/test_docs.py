# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/evaluation.md, one after the other, and those of the docstrings run as they stand there."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from sslkernels import data, evaluation
from sslkernels.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
MODULES = [module.name for module in pkgutil.iter_modules(evaluation.__path__)]


def test_examples_of_the_page():
    torch.manual_seed(0)
    names = dict(zip(["train_images", "train_labels", "test_images", "test_labels"], data.digits()))
    names |= {"method": PRESETS["simclr"].make(1), "clip": PRESETS["clip"].make(1)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6
    # the networks are untrained: raw features of digits, and names at random
    assert names["shares"][20][1] > 0.5 and names["shares"][20][5] > 0.8
    whole = evaluation.KNNClassifier(20).fit(names["train"], names["train_labels"])
    torch.testing.assert_close(names["similarity"], whole.neighbors(names["test"])[0])
    assert names["probe"].accuracy(names["test"], names["test_labels"]) > 0.5
    assert names["classifier"].shape == (10, 32) and names["std"].count == 1797


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name):
    module = importlib.import_module(f"sslkernels.evaluation.{name}")
    assert not doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed
