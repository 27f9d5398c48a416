# SPDX-License-Identifier: Apache-2.0
"""Philox words on the device: those of csrc/common/philox.h, bit for bit."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(seed, stream, index):
    """Word `index` (int64, >= 0) of `stream` (int64, of one shape) under an int64 seed, uint32."""
    block = index >> 2
    lane = index & 3
    a, b, c, d = tl.philox(
        seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    )
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


@triton.jit
def below(words, n):
    """Uniform in [0, n), n an int32 that is not negative; int32."""
    return tl.umulhi(words, tl.zeros_like(words) + n.to(tl.uint32)).to(tl.int32)
