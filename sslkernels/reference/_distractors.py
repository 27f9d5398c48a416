# SPDX-License-Identifier: Apache-2.0
"""wav2vec 2.0's distractors in plain PyTorch: how often each frame draws each other frame, and the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.reference import _philox as philox


def distractor_counts(seed: Tensor, lengths: Tensor, length: int, count: int) -> Tensor:
    """out[b, i, j]: how many of the `count` draws of frame i of sample b, uniform over its other frames, gave frame j.

    Draw c of frame i is word i * count + c of stream b: a number below lengths[b] - 1, and one more from i on. A frame
    beyond the length of its sample, or alone in it, draws nothing.
    """
    batch, index = lengths.shape[0], torch.arange(length, device=seed.device)
    draws = torch.arange(length * count, device=seed.device)
    n = lengths.clamp(0, length)[:, None]  # (B, 1)
    words = philox.words(seed, torch.arange(batch, device=seed.device)[:, None], draws)
    ids = philox.below(words, (n - 1).clamp(min=0)).view(batch, length, count)
    ids = ids + (ids >= index[:, None])
    draw = ((index < n) & (n > 1))[:, :, None].expand_as(ids)
    out = torch.zeros(batch, length, length, device=seed.device)
    return out.scatter_add(2, ids.clamp(max=max(length - 1, 0)), draw.to(out.dtype))
