# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses as modules; each is its function of the same name, whose docstring is the definition.

Constructors and `forward` take what lightly's, open_clip's or pytorch-metric-learning's class of that name takes where
the meaning is the same. Every `forward` also takes `sample_weight` and `return_stats`, as the functions do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels import distributed
from sslkernels.losses import _common as common
from sslkernels.losses._cpc import CPCLoss, cpc_loss
from sslkernels.losses._image_text import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from sslkernels.losses._info_nce import info_nce
from sslkernels.losses._module import Loss, spanning
from sslkernels.losses._supcon import supcon
from sslkernels.losses._views import dcl, mises_fisher_weights, nt_xent
from sslkernels.losses._wav2vec2 import Wav2Vec2Loss, diversity_loss, wav2vec2_loss
from sslkernels.losses.queue import MemoryQueue

__all__ = [
    "CPCLoss",
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "Wav2Vec2Loss",
    "clamp_logit_scale_",
    "clip_loss",
    "cpc_loss",
    "dcl",
    "diversity_loss",
    "info_nce",
    "mises_fisher_weights",
    "nt_xent",
    "siglip_loss",
    "supcon",
    "wav2vec2_loss",
]


@torch.no_grad()
def clamp_logit_scale_(logit_scale: Tensor, min: float = 0.0, max: float = math.log(100)) -> Tensor:
    """Put a learned log scale back into [min, max], in place; for after the optimizer's step, as CLIP's training does.

    Inside a forward a clamp would take the gradient away from a parameter beyond it.

    Example:
        >>> logit_scale = nn.Parameter(torch.tensor(5.0))
        >>> round(float(clamp_logit_scale_(logit_scale)), 4)
        4.6052
    """
    return logit_scale.clamp_(min, max)


class NTXentLoss(Loss):
    """`nt_xent` as a module; with a memory bank the loss of MoCo, as lightly's class of this name.

    Args:
        temperature: number, or nn.Parameter to be learned.
        memory_bank_size: (size, dim) of a queue whose keys are the negatives of out0, instead of the batch. out1 then
            is enqueued after the loss if out0 requires a gradient. A plain size takes dim from the first batch.
        gather_distributed: True is process_group="world", as lightly's.
        reduction, label_smoothing, beta, tau_plus, process_group, strategy: as in `nt_xent`; with a memory bank as in
            `info_nce`: every rank enqueues the keys of all.
        shard_memory_bank: each rank holds a part of the bank instead and enqueues its own keys; as in `MemoryQueue`.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.1)
        >>> loss = loss_fn(torch.randn(8, 16), torch.randn(8, 16))
    """

    memory_bank: MemoryQueue | None

    def __init__(
        self,
        temperature: nn.Parameter | float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        beta: float = 0.0,
        tau_plus: float = 0.0,
        process_group: Any = None,
        strategy: str | None = None,
        shard_memory_bank: bool = False,
    ) -> None:
        super().__init__(
            temperature, reduction=reduction, label_smoothing=label_smoothing, beta=beta, tau_plus=tau_plus
        )
        self.span = spanning(gather_distributed, process_group, strategy)
        size, *dim = (memory_bank_size,) if isinstance(memory_bank_size, int) else memory_bank_size
        if size < 0 or len(dim) > 1:
            raise ValueError(f"memory_bank_size must be a size or (size, dim), not negative, got {memory_bank_size}")
        self.bank_size, self.shard_memory_bank = size, shard_memory_bank
        self.memory_bank = self._bank(dim[0]) if size and dim else None
        if size and not dim:
            warnings.warn(f"memory_bank_size={size} has no dim and takes it from the first batch", stacklevel=2)

    def _bank(self, dim: int) -> MemoryQueue:
        options: dict[str, Any] = {"process_group": self.span["process_group"], "sharded": self.shard_memory_bank}
        return MemoryQueue(self.bank_size, dim, **options)

    def forward(
        self, out0: Tensor, out1: Tensor, *, sample_weight: Tensor | None = None, return_stats: bool = False
    ) -> Any:
        call = {**self.options, **self.span, "sample_weight": sample_weight, "return_stats": return_stats}
        if not self.bank_size:
            return nt_xent(out0, out1, self.temperature, **call)
        z0, z1 = memory_bank_views(out0, out1, sample_weight, process_group=self.span["process_group"])
        if self.memory_bank is None:
            self.memory_bank = self._bank(out0.shape[1]).to(out0.device)
        call["sharded_negatives"] = self.shard_memory_bank
        loss = info_nce(z0, z1, self.memory_bank.keys, self.temperature, normalize=False, **call)
        if out0.requires_grad:
            self.memory_bank(z1.detach())
        return loss

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        keys = state_dict.get(f"{prefix}memory_bank.keys")
        if self.bank_size and self.memory_bank is None and keys is not None:
            self.memory_bank = self._bank(keys.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)


@distributed.raises_together
def memory_bank_views(
    out0: Tensor, out1: Tensor, sample_weight: Tensor | None, *, process_group: Any
) -> tuple[Tensor, Tensor]:
    """Unit rows of both."""
    common.check_pair(sample_weight, out0=out0, out1=out1)
    return common.normalize(out0), common.normalize(out1)


class InfoNCELoss(Loss):
    """`info_nce` as a module.

    Args:
        temperature: number, or nn.Parameter to be learned.
        in_batch, normalize, reduction, label_smoothing, beta, tau_plus: as in `info_nce`.
        process_group, strategy, sharded_negatives: as in `info_nce`.

    Example:
        >>> loss_fn, queue = InfoNCELoss(temperature=0.07), MemoryQueue(1024, 16)
        >>> query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss = loss_fn(query, key, queue.keys)
        >>> queue(torch.nn.functional.normalize(key, dim=1))
        >>> loss.backward()
    """

    def __init__(
        self,
        temperature: nn.Parameter | float = 0.1,
        *,
        in_batch: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        beta: float = 0.0,
        tau_plus: float = 0.0,
        process_group: Any = None,
        strategy: str | None = None,
        sharded_negatives: bool = False,
    ) -> None:
        super().__init__(
            temperature,
            in_batch=in_batch,
            normalize=normalize,
            reduction=reduction,
            label_smoothing=label_smoothing,
            beta=beta,
            tau_plus=tau_plus,
        )
        self.span = spanning(False, process_group, strategy)
        if sharded_negatives:
            self.options["sharded_negatives"] = True

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        call = {**self.options, **self.span, "sample_weight": sample_weight, "return_stats": return_stats}
        return info_nce(query, positive_key, negative_keys, self.temperature, **call)


class SupConLoss(Loss):
    """`supcon` as a module.

    Args:
        temperature: number, or nn.Parameter to be learned.
        reduction, label_smoothing, process_group, strategy: as in `supcon`.

    Example:
        >>> loss = SupConLoss(temperature=0.1)(torch.randn(6, 16), torch.tensor([0, 0, 1, 1, 2, 2]))
    """

    def __init__(
        self,
        temperature: nn.Parameter | float = 0.1,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction, label_smoothing=label_smoothing)
        self.span = spanning(False, process_group, strategy)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        call = {**self.options, **self.span, "sample_weight": sample_weight, "return_stats": return_stats}
        return supcon(features, labels, self.temperature, **call)


class DCLLoss(Loss):
    """`dcl` as a module, as lightly's class of this name.

    Args:
        temperature: number, or nn.Parameter to be learned.
        weight_fn: as in `dcl`.
        gather_distributed: True is process_group="world", as lightly's.
        reduction, process_group, strategy: as in `dcl`.

    Example:
        >>> loss = DCLLoss(temperature=0.07)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: nn.Parameter | float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction)
        self.span = spanning(gather_distributed, process_group, strategy)
        self.weight_fn = weight_fn

    def forward(
        self, out0: Tensor, out1: Tensor, *, sample_weight: Tensor | None = None, return_stats: bool = False
    ) -> Any:
        call = {**self.options, **self.span, "sample_weight": sample_weight, "return_stats": return_stats}
        return dcl(out0, out1, self.temperature, self.weight_fn, **call)


class DCLWLoss(DCLLoss):
    """DCLLoss with the positives weighted by `mises_fisher_weights`, as lightly's class of this name.

    Args:
        temperature, gather_distributed, reduction, process_group, strategy: as in `DCLLoss`.
        sigma: temperature of the weights.

    Example:
        >>> loss = DCLWLoss()(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: nn.Parameter | float = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        process_group: Any = None,
        strategy: str | None = None,
    ) -> None:
        check.positive("sigma", sigma)
        weight_fn = partial(mises_fisher_weights, sigma=sigma)
        span: dict[str, Any] = {"process_group": process_group, "strategy": strategy}
        super().__init__(temperature, weight_fn, gather_distributed, reduction=reduction, **span)
