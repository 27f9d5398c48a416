# SPDX-License-Identifier: Apache-2.0
"""Whole losses, forward and backward, where the dispatcher finds the Triton kernels: what the ops save, the strides
that autograd hands on, and the kernels together give what the reference gives in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import losses


def rows(*shape: int) -> Tensor:
    return torch.randn(shape)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) * 7 % classes


# the loss, its leaves, and the ops that must have run
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]], set[str]]] = {
    "nt_xent": (
        lambda a, b: losses.nt_xent(a, b, 0.2), lambda: (rows(9, 20), rows(9, 20)), {"two_view_cross_entropy"},
    ),
    "nt_xent options": (
        lambda a, b: losses.nt_xent(a, b, 0.2, beta=0.5, tau_plus=0.1), lambda: (rows(9, 20), rows(9, 20)),
        {"self_similarity_logsumexp", "self_similarity_logsumexp_backward", "l2_normalize"},
    ),
    "dcl": (lambda a, b: losses.dcl(a, b), lambda: (rows(9, 20), rows(9, 20)), set()),
    "info_nce": (
        lambda a, b: losses.info_nce(a, b, in_batch=True, reduction="none").square().sum(),
        lambda: (rows(18, 20), rows(18, 20)), {"similarity_logsumexp"},
    ),
    "moco": (
        lambda a: losses.info_nce(a, a.detach().flip(1), unit(40, 20).to(a.dtype)), lambda: (rows(9, 20),),
        {"l2_normalize"},
    ),
    "clip": (
        lambda a, b, s: losses.clip_loss(F.normalize(a, dim=1), F.normalize(b, dim=1), s),
        lambda: (rows(18, 20), rows(18, 20), torch.tensor(8.0)), {"similarity_logsumexp"},
    ),
    "siglip": (
        lambda a, b, s, t: losses.siglip_loss(F.normalize(a, dim=1), F.normalize(b, dim=1), s, t),
        lambda: (rows(18, 20), rows(18, 20), torch.tensor(8.0), torch.tensor(-4.0)), {"similarity_softplus_sum"},
    ),
    "supcon": (lambda a: losses.supcon(a, labels(18, 4)), lambda: (rows(18, 20),), {"self_similarity_logsumexp"}),
    "barlow twins": (losses.barlow_twins_loss, lambda: (rows(9, 34), rows(9, 34)), {"two_view_correlation"}),
    "barlow twins, features": (
        losses.barlow_twins_loss, lambda: (rows(34, 18), rows(34, 18)), {"two_view_correlation"},
    ),
    "vicreg": (losses.vicreg_loss, lambda: (rows(9, 34), rows(9, 34)), {"two_view_covariance"}),
    "dino": (
        lambda s: losses.dino_loss(0.2 * unit(2, 3, 50).to(s.dtype), s, torch.zeros(50, dtype=s.dtype)),
        lambda: (rows(4, 3, 50),), {"soft_cross_entropy"},
    ),
    "dino head": (
        lambda s, w: losses.dino_loss(unit(2, 3, 20).to(s.dtype), s, weight=w, teacher_weight=w.detach()),
        lambda: (unit(4, 3, 20), unit(50, 20)), {"linear_soft_cross_entropy"},
    ),
    "swav": (
        lambda a, b: losses.swav_loss([a[0], a[1]], [b]), lambda: (0.3 * rows(2, 6, 20), 0.3 * rows(6, 20)),
        {"sinkhorn_center"},
    ),
    "byol": (lambda a: losses.byol_loss(a, a.detach().flip(1)), lambda: (rows(9, 20),), {"masked_regression"}),
    "koleo": (losses.koleo_loss, lambda: (rows(18, 20),), {"nearest"}),
    "masked lm": (
        lambda x, w, b: losses.masked_lm_loss(x, w, labels(18, 33).masked_fill(torch.arange(18) % 3 == 0, -100), b),
        lambda: (rows(18, 20), rows(33, 20), rows(33)), {"linear_cross_entropy"},
    ),
    "causal lm": (
        lambda x, w: losses.causal_lm_loss(x, w, labels(18, 33).view(2, 9)), lambda: (rows(2, 9, 20), rows(33, 20)),
        {"linear_cross_entropy"},
    ),
    "wav2vec2": (
        lambda c, t: losses.wav2vec2_loss(c, t, num_negatives=4, seed=3),
        lambda: (rows(2, 9, 20), rows(2, 9, 20)), {"distractor_counts"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_equals_float64(triton_serves: Callable[[], set[str]], name: str) -> None:
    loss, make, needed = LOSSES[name]
    leaves = [x.requires_grad_() for x in make()]
    torch.manual_seed(1)
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    assert needed <= triton_serves()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    torch.manual_seed(1)
    expected = loss(*wide)
    exact = torch.autograd.grad(expected, wide)
    assert abs(value.item() - expected.item()) <= 1e-5 * abs(expected.item())
    for found, true in zip(gradients, exact, strict=True):
        assert (found.double() - true).norm() <= 2e-5 * true.norm()
