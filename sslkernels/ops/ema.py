# SPDX-License-Identifier: Apache-2.0
"""Moving averages of parameter lists, in place: one call, and on CUDA one launch, for the whole list."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sslkernels import _checks as check
from sslkernels.ops._registry import LIBRARY, define
from sslkernels.reference import ema as reference

__all__ = ["ema_update_"]

FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
FORMAT_RANKS = {torch.channels_last: 4, torch.channels_last_3d: 5}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _format(x: Tensor) -> torch.memory_format | None:
    """The memory format in which `x` is dense; None if there is none."""
    fitting = (f for f in FORMATS if FORMAT_RANKS.get(f, x.ndim) == x.ndim)
    return next((f for f in fitting if x.is_contiguous(memory_format=f)), None)


def _local(i: int, target: Any, source: Any) -> tuple[Any, Any]:
    """The local shards of a pair of DTensors, which needs no communication where both are laid out alike."""
    names = [type(x).__name__ for x in (target, source)]
    if "DTensor" not in names:
        return target, source
    if names[0] != names[1]:
        raise TypeError(f"targets[{i}] is a {names[0]} and sources[{i}] a {names[1]}: both or neither must be DTensors")
    if target.placements != source.placements or target.device_mesh != source.device_mesh:
        raise ValueError(
            f"sources[{i}] must be placed as targets[{i}] ({target.placements} on {target.device_mesh}), "
            f"got {source.placements} on {source.device_mesh}"
        )
    return target.to_local(), source.to_local()


def _check_pair(i: int, target: Tensor, source: Tensor, device: torch.device) -> None:
    for name, x in ((f"targets[{i}]", target), (f"sources[{i}]", source)):
        check.tensor(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on the device of targets[0] ({device}), got {x.device}")
    if target.shape != source.shape:
        raise ValueError(
            f"sources[{i}] must have the shape of targets[{i}], {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    if _format(target) is None:
        raise ValueError(
            f"targets[{i}] must be contiguous or channels_last, got strides {target.stride()} for shape "
            f"{tuple(target.shape)}"
        )


def _check_momentum(momentum: Any, device: torch.device) -> None:
    if isinstance(momentum, Tensor):
        check.tensor("momentum", momentum)
        if momentum.numel() != 1 or momentum.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "momentum must be a number or one float32 or float64 element, got "
                f"{momentum.dtype} {tuple(momentum.shape)}"
            )
        if momentum.device != device:
            raise ValueError(f"momentum must be on the device of targets[0] ({device}), got {momentum.device}")
    elif isinstance(momentum, bool) or not isinstance(momentum, int | float):
        raise TypeError(f"momentum must be a number or a tensor, got {type(momentum).__name__}")
    else:
        reference.check_momentum(momentum)


def _span(x: Tensor, i: int) -> tuple[int, int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), i


def _check_overlap(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """No target shares memory with another, nor with a source but its own very self (a shared, frozen parameter)."""
    spans = sorted(_span(x, i) for i, x in enumerate(targets) if x.numel())
    for (_, end, i), (start, _, j) in pairwise(spans):
        if start < end:
            raise ValueError(f"targets[{max(i, j)}] overlaps targets[{min(i, j)}] in memory")
    starts = [start for start, _, _ in spans]
    for span in (_span(x, i) for i, x in enumerate(sources) if x.numel()):
        last = bisect_left(starts, span[1]) - 1  # of the targets that start before this source ends, the last
        if last >= 0 and spans[last][1] > span[0] and spans[last] != span:
            raise ValueError(f"sources[{span[2]}] overlaps targets[{spans[last][2]}] in memory")


def _reference(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum_tensor: Tensor | None, momentum: float
) -> None:
    reference.ema_update_(targets, sources, momentum if momentum_tensor is None else momentum_tensor)


_ema_update_ = define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor? momentum_tensor, float momentum) -> ()",
    reference=_reference,
    fake=None,
)


@torch.no_grad()
def _cpu(targets: list[Tensor], sources: list[Tensor], momentum_tensor: Tensor | None, momentum: float) -> None:
    """torch's own list kernel is at the bandwidth floor for one dtype; the reference does the rest."""
    if momentum_tensor is not None:
        momentum = momentum_tensor.item()
    reference.check_momentum(momentum)
    if {x.dtype for x in (*targets, *sources)} in ({torch.float32}, {torch.float64}):
        torch._foreach_lerp_(targets, sources, 1 - momentum)
    else:
        reference.ema_update_(targets, sources, momentum)


LIBRARY.impl("ema_update_", _cpu, "CPU")


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: Tensor | float) -> None:
    """Move each target towards its source, in place: an exponential moving average of parameters.

        target <- momentum * target + (1 - momentum) * source        as target + (1 - momentum) (source - target)

    Arithmetic is float32, float64 where either tensor of a pair is. A 16-bit target is rounded to nearest, so it stops
    moving once a step is below half its spacing (momentum 0.996 is past that): keep float32 targets for 16-bit sources.

    Args:
        targets: tensors of any shapes and floating dtypes, on one device, contiguous or channels_last.
        sources: as many tensors, each of its target's shape, of any floating dtype; other strides cost a copy.
        momentum: in [0, 1]: a number, or one float32 or float64 element on the targets' device, which is read without
            a host sync. On the CPU a tensor outside [0, 1] raises; elsewhere it changes no target.

    DTensors are updated shard by shard where target and source are placed alike. No gradient flows.

    Raises:
        ValueError, TypeError: lists of different lengths; a pair of different shapes; a dtype, device, layout or
            momentum other than above; targets that overlap in memory. No target has been written then.

    Example:
        >>> teacher, student = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> ema_update_(teacher.parameters(), student.parameters(), 0.996)

    Source: Polyak and Juditsky 1992; as in MoCo (arXiv:1911.05722) and BYOL (arXiv:2006.07733).
    """
    all_targets, all_sources = list(targets), list(sources)
    if len(all_targets) != len(all_sources):
        raise ValueError(
            f"targets and sources must have the same length, got {len(all_targets)} and {len(all_sources)}"
        )
    pairs = [_local(i, *pair) for i, pair in enumerate(zip(all_targets, all_sources, strict=True))]
    if not pairs:
        if not isinstance(momentum, Tensor):
            _check_momentum(momentum, torch.device("cpu"))
        return
    check.tensor("targets[0]", pairs[0][0])
    device = pairs[0][0].device
    for i, (target, source) in enumerate(pairs):
        _check_pair(i, target, source, device)
    _check_momentum(momentum, device)
    local_targets = [target for target, _ in pairs]
    local_sources = [source.contiguous(memory_format=_format(target) or FORMATS[0]) for target, source in pairs]
    real = not (torch.compiler.is_compiling() or device.type == "meta" or isinstance(local_targets[0], FakeTensor))
    if real:
        _check_overlap(local_targets, local_sources)
    given = isinstance(momentum, Tensor)
    _ema_update_(local_targets, local_sources, momentum if given else None, math.nan if given else float(momentum))
    if real:  # so that autograd notices a target that was saved for backward; a CUDA kernel does not tell it
        torch.autograd.graph.increment_version([x for x in local_targets if not x.is_inference()])
