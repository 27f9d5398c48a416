# SPDX-License-Identifier: Apache-2.0
"""Training a preset on ranks, for test_training.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.training import Training


def curve(group: Any, name: str, steps: int, dtype: str = "float64") -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a training, and the state that the method is left in."""
    training = Training(name, steps=20, dtype=getattr(torch, dtype), process_group=group)
    losses = training.run(steps)
    state = {key: x.double() for key, x in training.method.state_dict().items() if isinstance(x, Tensor)}
    return losses, state


def scored(group: Any, name: str) -> bool:
    """Whether rank 0 alone can tell what the method is worth, and goes on as if it had not."""
    import torch.distributed as dist

    training = Training(name, steps=20, process_group=group)
    training.run(1)
    state = torch.get_rng_state()
    if dist.get_rank(group) == 0:
        scores = training.accuracy()
        assert scores == training.alone().accuracy() and training.alone().ranks.local
    return torch.equal(torch.get_rng_state(), state)
