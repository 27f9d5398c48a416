# SPDX-License-Identifier: Apache-2.0
"""MoCo's queue of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.ops import enqueue_


class MemoryQueue(nn.Module):
    """Ring buffer of the last `size` keys, in the module's state_dict.

        keys[(pointer + j) % size] = new_keys[j]        for each j in order
        pointer = (pointer + len(new_keys)) % size

    It starts with random unit rows, as MoCo's. Keys are stored as they come: normalise them first. The losses do not
    save frozen keys, so enqueueing between a forward that read `keys` and its backward is legal.

    Source: facebookresearch/moco `moco/builder.py::MoCo._dequeue_and_enqueue`; here any batch size is.

    Args:
        size: number of keys.
        dim: width of a key.
        dtype: of the storage; 16 bits halve the memory.
        generator: of the first rows.

    Buffers:
        keys: (size, dim).
        pointer: where the next key goes, int64, ().

    Raises:
        ValueError, TypeError: size or dim not positive, a dtype that is not floating, keys of another width.

    Example:
        >>> queue = MemoryQueue(1024, 128)
        >>> queue(torch.nn.functional.normalize(torch.randn(256, 128), dim=1))
        >>> int(queue.pointer)
        256
    """

    keys: Tensor
    pointer: Tensor

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, x in (("size", size), ("dim", dim)):
            if isinstance(x, bool) or not isinstance(x, int):
                raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
            if x < 1:
                raise ValueError(f"{name} must be positive, got {x}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        keys = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("keys", keys.to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, keys: Tensor) -> None:
        """Enqueue keys (N, dim) in place, the oldest ones give way."""
        enqueue_(self.keys, self.pointer, keys)

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}, dtype={self.keys.dtype}"
