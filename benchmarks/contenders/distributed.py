# SPDX-License-Identifier: Apache-2.0
"""What peers ship for a batch that several processes hold, restated: only what gives the right gradient.

Each takes this rank's rows and returns its loss, whose mean over the ranks is that of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

RIGHT_FLAGS = "ClipLoss(local_loss=True, gather_with_grad=True)"


class _Gather(torch.autograd.Function):
    """All ranks' tensors; backward sums the gradients of all of them on every rank, and takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        everything = torch.stack(grads)
        dist.all_reduce(everything)
        return everything[dist.get_rank()]


def lightly_nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    a, b = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    n, device = len(a), a.device
    all_a, all_b = torch.cat(_Gather.apply(a), 0), torch.cat(_Gather.apply(b), 0)
    own = torch.zeros((n, len(all_a)), dtype=torch.bool, device=device)
    own[:, dist.get_rank() * n : (dist.get_rank() + 1) * n] = torch.eye(n, dtype=torch.bool, device=device)
    aa, ab, ba, bb = (
        torch.einsum("nc,mc->nm", x, y) / temperature for x, y in ((a, all_a), (a, all_b), (b, all_a), (b, all_b))
    )
    aa, bb = aa[~own].view(n, -1), bb[~own].view(n, -1)
    logits = torch.cat([torch.cat([ab, aa], dim=1), torch.cat([ba, bb], dim=1)], dim=0)  # (2n, 2N - 1)
    labels = torch.arange(n, device=device) + dist.get_rank() * n
    return F.cross_entropy(logits, labels.repeat(2))


def open_clip_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """With RIGHT_FLAGS."""
    from torch.distributed.nn import functional

    everything = [torch.cat(functional.all_gather(x), dim=0) for x in (image, text)]
    return clip_rows(image, text, *everything, logit_scale)


def clip_rows(image: Tensor, text: Tensor, images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Of the own rows, against those of all ranks."""
    per_image = logit_scale * image @ texts.T
    per_text = logit_scale * text @ images.T
    labels = torch.arange(len(image), device=image.device) + len(image) * dist.get_rank()
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
