# SPDX-License-Identifier: Apache-2.0
"""Peers that run on a GPU only: the real packages, called as their documentation says. Where one does not import it is
left out, and the table says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Contender

ROUNDED = 2e-2  # relative error of a gradient that 16 bits allow


def memeff(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Its temperature is a number without a gradient: the one of the case, not read from the device."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=0.07, normalized_inputs=True, stable=False)
    return loss(image, text) + 0.0 * logit_scale


def inf_cl(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """float32 inside, whatever comes."""
    from inf_cl import cal_flash_loss

    both = [cal_flash_loss(a, b, scale=logit_scale).mean() for a, b in ((image, text), (text, image))]
    return sum(both) / 2


def siglip_kernel(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(image, text, logit_scale.log(), logit_bias)


def liger(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, input, target)


def apex_average(targets: list[Tensor], sources: list[Tensor], momentum: float) -> list[Tensor]:
    """target = momentum * target + (1 - momentum) * source, by apex's multi-tensor kernel."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    overflow = torch.zeros(1, dtype=torch.int32, device=targets[0].device)
    lists = [targets, sources, targets]
    multi_tensor_applier(amp_C.multi_tensor_axpby, overflow, lists, momentum, 1.0 - momentum, -1)
    return targets


def real(name: str, call: Callable[..., Any], source: str, ignores: tuple[str, ...] = ()) -> Contender:
    return Contender(name, call, source, real=True, limit=ROUNDED, ignores=ignores)


MEMEFF = real(
    "memeff", memeff, "memeff, MemoryEfficientCLIPLoss(stable=False), as installed; no gradient of the scale",
    ignores=("logit_scale",),
)  # fmt: skip
INF_CL = real("inf-cl", inf_cl, "inf_cl, cal_flash_loss, as installed")
SIGLIP_KERNEL = real("siglip-kernel", siglip_kernel, "siglip_kernel, fused_siglip_loss, as installed")
LIGER = real("liger", liger, "liger_kernel, LigerFusedLinearCrossEntropyLoss, as installed")
APEX = real("apex", apex_average, "apex, multi_tensor_axpby, as installed")
