# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours in plain differentiable PyTorch: the definition, on any device, in any floating dtype.

Arithmetic is float64 for float64 input and float32 otherwise.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sslkernels.reference._precision import compute_dtype

EPS = 1e-8


def koleo(x: Tensor, eps: float = EPS) -> Tensor:
    """How close the rows of x (N, D) lie to each other: a regularizer that keeps a batch's features apart.

        u_i  = x_i / max(|x_i|, eps)
        n(i) = argmax over j != i of <u_i, u_j>                 no gradient
        loss = -mean_i log(|u_i - u_n(i) + eps| + eps)          eps is added to every component

    The gradient reaches u_i and its neighbour. In 16 bits eps would be zero and a pair of equal rows infinite, so that
    nothing here is; two equal rows cost -log(eps (sqrt(D) + 1)) each, 15.4 at D = 384.

    Source: Sablayrolles et al. 2019 (arXiv:1806.03198), facebookresearch/dinov2 `dinov2/loss/koleo_loss.py`.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x must be (N, D) with at least 2 rows, got {tuple(x.shape)}")
    u = F.normalize(x.to(compute_dtype(x)), dim=1, eps=eps)
    similarity = u.detach() @ u.detach().T
    nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
    return -(F.pairwise_distance(u, u[nearest], eps=eps) + eps).log().mean()
