# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 in int64 tensor arithmetic: the random words of csrc/common/philox.h, bit for bit, on any device.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 by 32 bit product; the int64 product wraps around, and its bits are right."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def words(seed: Tensor, stream: Tensor, index: Tensor) -> Tensor:
    """Random word `index` of `stream` under `seed`: int64 in [0, 2^32), in the broadcast shape of stream and index.

    All three are int64 tensors on one device; seed has one element. index >= 0.
    """
    stream, index = torch.broadcast_tensors(stream, index)
    block, lane = index >> 2, index & 3
    key = [seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW]
    c = [block & _LOW, (block >> 32) & _LOW, stream & _LOW, (stream >> 32) & _LOW]
    for _ in range(10):
        even_high, even_low = _multiply(0xD2511F53, c[0])
        odd_high, odd_low = _multiply(0xCD9E8D57, c[2])
        c = [odd_high ^ c[1] ^ key[0], odd_low, even_high ^ c[3] ^ key[1], even_low]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    return torch.stack(c, dim=-1).gather(-1, lane.unsqueeze(-1)).squeeze(-1)


def below(word: Tensor, n: Tensor | int) -> Tensor:
    """Uniform in [0, n), n < 2^31."""
    return (word * n) >> 32


def uniform(word: Tensor) -> Tensor:
    """Uniform in [0, 1), float32, a multiple of 2^-24."""
    return (word >> 8).to(torch.float32) * 2.0**-24
