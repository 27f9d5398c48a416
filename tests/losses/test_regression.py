# SPDX-License-Identifier: Apache-2.0
"""BYOL's, SimSiam's and the masked losses: as the originals' code, as functions and modules, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops
from sslkernels.losses import (
    BYOLLoss,
    MaskedRegressionLoss,
    NegativeCosineSimilarity,
    byol_loss,
    negative_cosine_similarity,
)

F64 = torch.float64


def pair(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=dtype, requires_grad=True), torch.randn(*shape, dtype=dtype)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def test_byol() -> None:
    p, z = pair(12, 33)
    u, v = (x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1e-12)) for x in (p, z))
    expected = (u - v).square().sum(-1).mean()
    torch.testing.assert_close(byol_loss(p, z), expected)
    torch.testing.assert_close(gradients(BYOLLoss()(p, z), p), gradients(expected, p))


@pytest.mark.parametrize("dim", [1, 0, -1])
@pytest.mark.parametrize("both", [False, True])
def test_negative_cosine_similarity(both: bool, dim: int) -> None:
    """lightly's class: the gradient of both arguments where both require one."""
    x0, x1 = pair(12, 33)
    x1.requires_grad_(both)
    inputs = (x0, x1) if both else (x0,)
    module = NegativeCosineSimilarity(dim=dim)
    for loss in (module(x0, x1), negative_cosine_similarity(x0, x1, dim)):
        expected = -F.cosine_similarity(x0, x1, dim=dim, eps=1e-8).mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, *inputs), gradients(expected, *inputs))
    frozen = module(x0.detach(), x1)
    assert frozen.requires_grad == both
    torch.testing.assert_close(frozen.detach(), expected.detach())


def test_byol_of_two_views_is_four_plus_four_simsiam() -> None:
    (p1, z1), (p2, z2) = pair(8, 16), pair(8, 16)
    simsiam = 0.5 * (negative_cosine_similarity(p1, z2) + negative_cosine_similarity(p2, z1))
    torch.testing.assert_close(byol_loss(p1, z2) + byol_loss(p2, z1), 4 + 4 * simsiam)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "smooth_l1", "normalize_target": True},
        {"loss": "l1", "normalize_target": True},
        {"loss": "l2", "scale": 4.0},
        {"loss": "smooth_l1", "beta": 0.5, "reduction": "sum"},
        {"loss": "cosine", "reduction": "none", "eps": 1e-6},
    ],
)
def test_module_holds_the_options(options: dict[str, Any]) -> None:
    pred, target = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(2, 9, 16)
    ids = torch.randint(9, (2, 3, 4))
    module = MaskedRegressionLoss(**options)
    expected = ops.masked_regression(pred, target, ids, **options)
    assert torch.equal(module(pred, target, ids), expected)
    mask = torch.rand(2, 9) < 0.5
    got = module(target + 1, target, mask=mask)
    assert torch.equal(got, ops.masked_regression(target + 1, target, mask=mask, **options))
    assert all(f"{name}={x!r}" in repr(module) for name, x in options.items())
    assert not module.state_dict()


def test_modules_compile() -> None:
    torch._dynamo.reset()
    p, z = pair(6, 16, dtype=torch.float32)
    for module in (BYOLLoss(), NegativeCosineSimilarity(), MaskedRegressionLoss()):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled(p, z), p), gradients(module(p, z), p))


def test_under_autocast() -> None:
    p, z = (x.bfloat16() for x in pair(6, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for module in (BYOLLoss(), NegativeCosineSimilarity(), MaskedRegressionLoss()):
            assert module(p, z).dtype == torch.float32


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: byol_loss(X[:0], X[:0]), ValueError, "pred must not be an empty batch, got shape (0, 4)"),
        (lambda: byol_loss(X, X[:2]), ValueError, "target must have the shape of pred (3, 4)"),
        (lambda: byol_loss([1.0], X), TypeError, "pred must be a torch.Tensor, got list"),  # type: ignore[arg-type]
        (lambda: negative_cosine_similarity(X, X[:0]), ValueError, "x1 must not be an empty batch"),
        (lambda: negative_cosine_similarity(X, X[:2]), ValueError, "x1 must have the shape of x0 (3, 4), got (2, 4)"),
        (lambda: negative_cosine_similarity(X, X, dim=2), ValueError, "dim must be in [-2, 2), got 2"),
        (lambda: negative_cosine_similarity(X, X.long()), TypeError, "x1 must be float32, float64, bfloat16"),
        (lambda: NegativeCosineSimilarity(eps=0.0), ValueError, "eps must be positive and finite, got 0.0"),
        (lambda: MaskedRegressionLoss()(X[:0], X[:0]), ValueError, "pred must not be an empty batch"),
        (lambda: MaskedRegressionLoss("huber"), ValueError, "loss must be one of"),
        (lambda: MaskedRegressionLoss(reduction="max"), ValueError, "reduction must be one of"),
    ],
)
def test_refused_by_name(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
