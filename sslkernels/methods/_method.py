# SPDX-License-Identifier: Apache-2.0
"""What every method is: a module that turns a batch into a loss."""

from __future__ import annotations

from torch import Tensor, nn


class Method(nn.Module):
    """`loss, metrics = method(batch)`; metrics are detached scalars. The whole state is in the `state_dict`.

    for step, batch in enumerate(loader):
        loss, metrics = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
    """

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, dim) for use downstream: what the backbone returns, before any projection."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """What the method does after the optimizer's step; most do nothing."""
