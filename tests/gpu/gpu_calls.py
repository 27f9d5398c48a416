# SPDX-License-Identifier: Apache-2.0
"""Every op but masks and what works in place, by one convention: what it is called with, which inputs are leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import ops
from sslkernels.ops import Exclude

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """`run(**inputs)` gives a tensor or several; `make()` the inputs, float32 on the CPU.

    `leaves` get gradients; `fixed` keep their dtype where the others are cast.
    """

    run: Callable[..., Any]
    make: Callable[[], Inputs]
    leaves: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    exact: bool = False  # integers, or copies of elements: no rounding

    def inputs(self, dtype: torch.dtype, device: str, wide: bool = False) -> Inputs:
        """The values of `dtype`, as float64 if `wide`; the same at every call."""
        torch.manual_seed(0)

        def placed(name: str, x: Any) -> Any:
            if isinstance(x, list):
                return [placed(name, y) for y in x]
            if not isinstance(x, Tensor):
                return x
            if x.is_floating_point() and name not in self.fixed:
                x = x.to(dtype)
            if x.is_floating_point() and wide:
                x = x.double()
            # .to() keeps strides; a leaf has its own memory
            return x.to(device).detach().clone().requires_grad_(name in self.leaves)

        return {name: placed(name, x) for name, x in self.make().items()}

    def step(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the gradient of every leaf for a fixed cotangent."""
        outputs = self.run(**inputs)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        leaves = leaves_of(inputs)
        if not leaves:
            return outputs, []
        differentiable = [x for x in outputs if x.requires_grad]
        cotangents = [cotangent(x) for x in differentiable]
        return [x.detach() for x in outputs], list(torch.autograd.grad(differentiable, leaves, cotangents))


def leaves_of(inputs: Inputs) -> list[Tensor]:
    held = [y for x in inputs.values() for y in (x if isinstance(x, list) else [x])]
    return [x for x in held if isinstance(x, Tensor) and x.requires_grad]


def cotangent(x: Tensor) -> Tensor:
    """Between 0.5 and 1.5, the same on every device and in every dtype: no rounding."""
    drawn = 0.5 + torch.arange(x.numel(), device=x.device, dtype=torch.float64) * 0.618 % 1
    return ((128 * drawn).round() / 128).view(x.shape).to(x.dtype)


def pair(n: int, m: int, d: int, size: float = 3.0) -> Inputs:
    """Logits of a few units."""
    q, k = torch.randn(n, d), torch.randn(m, d)
    q[: min(n, m)] += 0.5 * k[: min(n, m)]
    return {"q": q * (size / d**0.5), "k": k, "scale": torch.tensor(0.9)}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def excluded(x: Tensor) -> Exclude:
    """Group labels of every kind of device."""
    groups = torch.arange(len(x), device=x.device) % 7
    return Exclude(diagonal=0, query_groups=groups, key_groups=groups, differ=True)


def token_inputs() -> Inputs:
    target = torch.randint(1003, (300,))
    target[::3] = -100
    return {
        "input": torch.randn(300, 96), "weight": torch.randn(1003, 96) / 10, "bias": torch.randn(1003),
        "target": target,
    }  # fmt: skip


def image_inputs(length: int = 12) -> Inputs:
    ids = torch.stack([torch.randperm(49)[:length] for _ in range(6)])
    return {"images": torch.randn(6, 3, 112, 112), "ids": ids}


def distinct(n: int, length: int, keep: int) -> Tensor:
    return torch.stack([torch.randperm(length)[:keep] for _ in range(n)])


def skipgram_inputs() -> Inputs:
    return {
        "u": torch.randn(500, 64) / 8, "v": torch.randn(700, 64) / 8, "inputs": torch.randint(500, (256,)),
        "outputs": torch.randint(700, (256,)), "negatives": torch.randint(700, (256, 5)),
    }  # fmt: skip


def sampled_inputs() -> Inputs:
    return pair(200, 300, 96) | {"indices": torch.randint(300, (200, 40)), "mask": torch.rand(200, 40) < 0.8}


def apart(n: int, m: int, d: int) -> Inputs:
    """Queries beside keys of their own, far from all others."""
    k = torch.randn(m, d)
    return {"q": k[torch.arange(n) * 3 % m] + 0.1 * torch.randn(n, d), "k": k}


QKS = ("q", "k", "scale")
CALLS: dict[str, Call] = {
    "l2_normalize": Call(
        lambda x, y: ops.l2_normalize(x, y), lambda: {"x": torch.randn(300, 97), "y": torch.randn(97, 200).T},
        ("x", "y"),
    ),
    "similarity_logsumexp": Call(ops.similarity_logsumexp, lambda: pair(300, 261, 96), QKS, ("scale",)),
    "similarity_logsumexp wide": Call(ops.similarity_logsumexp, lambda: pair(260, 300, 640), QKS, ("scale",)),
    "similarity_logsumexp excluded": Call(
        lambda q, k, scale: ops.similarity_logsumexp(q, k, scale, excluded(q)),
        lambda: pair(256, 256, 64), QKS, ("scale",),
    ),
    "similarity_logsumexp positives": Call(
        lambda q, k, scale: ops.similarity_logsumexp(q, k, scale, Exclude(diagonal=0), return_positive=True),
        lambda: pair(256, 256, 64), QKS, ("scale",),
    ),
    "similarity_logsumexp scales": Call(
        lambda q, k, scale: ops.similarity_logsumexp(q, k, scale, scales=(1.0, 0.25, 2.0)),
        lambda: pair(129, 130, 40), QKS, ("scale",),
    ),
    "similarity_logsumexp frozen keys": Call(
        lambda q, k, scale: ops.similarity_logsumexp(q, k, scale, columns=False)[0],
        lambda: pair(100, 5000, 128), ("q", "scale"), ("scale",),
    ),
    "self_similarity_logsumexp": Call(
        lambda q, scale: ops.self_similarity_logsumexp(q, scale, Exclude(diagonal=0, period=256), return_positive=True),
        lambda: {"q": pair(512, 512, 128)["q"], "scale": torch.tensor(1.1)}, ("q", "scale"), ("scale",),
    ),
    "self_similarity_logsumexp wide": Call(
        lambda q, scale: ops.self_similarity_logsumexp(q, scale),
        lambda: {"q": pair(330, 330, 768)["q"], "scale": torch.tensor(1.1)}, ("q", "scale"), ("scale",),
    ),
    "similarity_cross_entropy": Call(
        lambda q, k, scale, positive: ops.similarity_cross_entropy(q, k, positive, scale, weight=1 / 300)[0],
        lambda: pair(300, 261, 96) | {"positive": torch.randn(300)}, (*QKS, "positive"), ("scale", "positive"),
    ),
    "two_view_cross_entropy": Call(
        lambda x, y, scale: ops.two_view_cross_entropy(x, y, scale, weight=1 / 256)[0],
        lambda: {"x": torch.randn(128, 128), "y": torch.randn(128, 128), "scale": torch.tensor(8.0)},
        ("x", "y", "scale"), ("scale",),
    ),
    "similarity_softplus": Call(
        ops.similarity_softplus, lambda: pair(300, 261, 96) | {"bias": torch.tensor(-2.0)},
        (*QKS, "bias"), ("scale", "bias"),
    ),
    "similarity_softplus_sum": Call(
        lambda q, k, scale, bias: ops.similarity_softplus_sum(q, k, scale, bias, weight=0.01),
        lambda: pair(300, 261, 768) | {"bias": torch.tensor(-2.0)}, (*QKS, "bias"), ("scale", "bias"),
    ),
    "sampled_logsumexp": Call(
        lambda q, k, scale, indices, mask: ops.sampled_logsumexp(q, k, indices, scale, mask=mask), sampled_inputs, QKS,
        ("scale",),
    ),
    "standardize": Call(ops.standardize, lambda: {"x": 3 + torch.randn(260, 515)}, ("x",)),
    "product_frobenius batch": Call(
        ops.product_frobenius, lambda: {"a": torch.randn(64, 600), "b": torch.randn(64, 520)}, ("a", "b")
    ),
    "product_frobenius features": Call(
        lambda a: ops.product_frobenius(a, off_diagonal=True), lambda: {"a": torch.randn(600, 260)}, ("a",)
    ),
    "two_view_correlation batch": Call(
        ops.two_view_correlation, lambda: {"x": torch.randn(96, 1024), "y": torch.randn(96, 1024)}, ("x", "y")
    ),
    "two_view_correlation features": Call(
        ops.two_view_correlation, lambda: {"x": torch.randn(700, 320), "y": torch.randn(700, 320)}, ("x", "y")
    ),
    "two_view_covariance": Call(
        ops.two_view_covariance, lambda: {"x": torch.randn(96, 1024), "y": torch.randn(96, 1024)}, ("x", "y")
    ),
    "soft_cross_entropy": Call(
        lambda s, t, c: ops.soft_cross_entropy(s, t, c, return_center=True),
        lambda: {
            "s": [torch.randn(2, 16, 5003) / 4, torch.randn(3, 16, 5003) / 4], "t": torch.randn(2, 16, 5003) / 8,
            "c": torch.randn(5003) / 10,
        },
        ("s",), ("c",),
    ),
    "soft_cross_entropy rows": Call(
        lambda s, t: ops.soft_cross_entropy(s, t, reduction="none"),
        lambda: {"s": torch.randn(33, 3000) / 4, "t": torch.randn(33, 3000) / 8}, ("s",),
    ),
    "softmax_center": Call(ops.softmax_center, lambda: {"logits": torch.randn(40, 5003) / 8}),
    "linear_soft_cross_entropy": Call(
        lambda s, w, t: ops.linear_soft_cross_entropy(s, w, t),
        lambda: {"s": unit(4, 16, 96), "w": unit(3001, 96), "t": unit(2, 16, 96)}, ("s", "w"),
    ),
    "sinkhorn_knopp": Call(ops.sinkhorn_knopp, lambda: {"scores": torch.randn(130, 515) / 6}),
    "sinkhorn_center": Call(ops.sinkhorn_center, lambda: {"scores": torch.randn(130, 515) / 6}),
    "sinkhorn_sweep": Call(ops.sinkhorn_sweep, lambda: {"scores": torch.randn(130, 515) / 6}),
    "sinkhorn_sweep with a centre": Call(
        ops.sinkhorn_sweep, lambda: {"scores": torch.randn(130, 515) / 6, "center": torch.randn(515) / 20}
    ),
    "gather_patches": Call(ops.gather_patches, image_inputs, ("images",), exact=True),
    "gather_patches uint8": Call(
        lambda images, ids, mean, std: ops.gather_patches(images, ids, 16, channels_last=True, mean=mean, std=std),
        lambda: {
            "images": torch.randint(256, (6, 3, 112, 112)).byte(), "ids": distinct(6, 49, 12),
            "mean": torch.rand(3), "std": torch.rand(3) + 0.5,
        },
        (), ("mean", "std"),
    ),
    "embed_patches": Call(
        ops.embed_patches,
        lambda: image_inputs() | {
            "weight": torch.randn(64, 3, 16, 16) / 28, "bias": torch.randn(64), "position": torch.randn(49, 64),
        },
        ("weight", "bias", "position"),
    ),
    "gather_tokens": Call(
        ops.gather_tokens, lambda: {"tokens": torch.randn(6, 50, 72), "ids": torch.randint(50, (6, 30))}, ("tokens",)
    ),
    "restore_tokens": Call(
        ops.restore_tokens,
        lambda: {
            "visible": torch.randn(6, 20, 72), "ids": distinct(6, 50, 20), "mask_token": torch.randn(1, 1, 72),
            "position": torch.randn(50, 72),
        },
        ("visible", "mask_token", "position"),
    ),
    "masked_patch_loss": Call(
        lambda pred, images, ids: ops.masked_patch_loss(pred, images, ids, 16, normalize="patch"),
        lambda: image_inputs() | {"pred": torch.randn(6, 12, 768)}, ("pred",),
    ),
    "permute_patches": Call(
        lambda images, ids: ops.permute_patches(images, ids, 16),
        lambda: {"images": torch.randn(6, 3, 112, 112), "ids": distinct(6, 49, 49)}, ("images",), exact=True,
    ),
    "masked_regression": Call(
        lambda pred, target, ids: ops.masked_regression(pred, target, ids, normalize_target=True),
        lambda: {"pred": torch.randn(6, 20, 200), "target": torch.randn(6, 50, 200), "ids": distinct(6, 50, 20)},
        ("pred",),
    ),
    "masked_regression rows": Call(
        lambda pred, target: ops.masked_regression(pred, target, loss="cosine", reduction="none"),
        lambda: {"pred": torch.randn(50, 200), "target": torch.randn(50, 200)}, ("pred",),
    ),
    "average_layers": Call(ops.average_layers, lambda: {"layers": [torch.randn(4, 60, 96) for _ in range(3)]}),
    "linear_cross_entropy": Call(
        lambda input, weight, bias, target: ops.linear_cross_entropy(
            input, weight, target, linear_bias=bias, label_smoothing=0.1, z_loss=1e-3
        ),
        token_inputs, ("input", "weight", "bias"),
    ),
    "linear_cross_entropy rows": Call(
        lambda input, weight, bias, target: ops.linear_cross_entropy(
            input, weight, target, linear_bias=bias, reduction="none"
        ),
        token_inputs, ("input", "weight", "bias"),
    ),
    "skipgram": Call(
        lambda u, v, inputs, outputs, negatives: ops.skipgram(u, v, inputs, outputs, negatives),
        skipgram_inputs, ("u", "v"),
    ),
    "skipgram sparse": Call(
        lambda u, v, inputs, outputs, negatives: ops.skipgram(u, v, inputs, outputs, negatives, sparse=True),
        skipgram_inputs, ("u", "v"),
    ),
    # far apart, so that rounding changes no choice
    "nearest": Call(lambda q, k: ops.nearest(q, k), lambda: apart(64, 300, 48)),
    "nearest dot": Call(lambda q, k: ops.nearest(q, k, metric="dot"), lambda: apart(5, 4000, 48)),
    "topk_similarity": Call(
        lambda q, k: ops.topk_similarity(q, k, 1, metric="cosine"), lambda: apart(64, 300, 48)
    ),
    "topk_similarity panel": Call(
        lambda q, k: ops.topk_similarity(q, k, 40)[0], lambda: {"q": torch.randn(33, 48), "k": torch.randn(500, 48)}
    ),
    "distractor_counts": Call(
        lambda lengths: ops.distractor_counts(lengths, 60, 20, seed=3),
        lambda: {"lengths": torch.tensor([60, 17, 2, 40])}, exact=True,
    ),
}  # fmt: skip
