# SPDX-License-Identifier: Apache-2.0
"""Losses over a batch that several processes hold, as exact as over one.

The contract: with R ranks, the mean over the ranks of the losses they return, and the gradient of every parameter after
DistributedDataParallel's average, are those of one process on all rows below each other. Each rank returns R / N times
the sum over its own rows of a mean over N; its gradient is that of the sum of all ranks' losses.
"""

from sslkernels.distributed._agreement import raises_together
from sslkernels.distributed._group import STRATEGIES, Batch, Group, alone, batch

__all__ = ["STRATEGIES", "Batch", "Group", "alone", "batch", "raises_together"]
