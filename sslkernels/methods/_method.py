# SPDX-License-Identifier: Apache-2.0
"""What every method is: a module that turns a batch into a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sslkernels import distributed


class Method(nn.Module):
    """`loss, metrics = method(batch)`; metrics are detached scalars. The whole state is in the `state_dict`.

    With `process_group` the loss is of the batches of all its ranks, as in `distributed.Group`, and the model is
    wrapped in DistributedDataParallel, with `nn.global_batch_norm` where it has batch norm; then the ranks train as one
    process does on all rows. Metrics stay those of the own rows.

    for step, batch in enumerate(loader):
        loss, metrics = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
    """

    def __init__(self, process_group: Any = None) -> None:
        super().__init__()
        self.process_group = process_group

    def whole(self, x: Tensor) -> distributed.Batch:
        """The batch of all ranks, of which this one has the rows x."""
        return distributed.batch(self.process_group, None, type(self).__name__, rows=x)

    def draw(self, x: Tensor, draw: Callable[[int], Any]) -> Any:
        """What `draw(rows)` gives the rows x: tensors (rows, ...) for those of all ranks, drawn alike on each.

        So that no two ranks draw the same for different rows, and masks are those of one process; torch's generators
        must be in the same state on all ranks, as one seed leaves them. In evaluation mode a rank draws for itself.

        Meant for what is small, masks and ids: each rank makes the draws of all. Of what is as wide as features draw a
        seed a row, and the own rows from their seeds, as `Data2Vec.draw_noise`.
        """
        batch = self.whole(x) if self.training else distributed.alone(x)
        if batch.local:
            return draw(batch.rows)
        rows = batch.rows * batch.world if batch.sizes is None else int(batch.sizes.sum())
        return tree_map(lambda drawn: batch.own(drawn) if isinstance(drawn, Tensor) else drawn, draw(rows))

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, dim) for use downstream: what the backbone returns, before any projection."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """What the method does after the optimizer's step; most do nothing."""
