# SPDX-License-Identifier: Apache-2.0
"""Moving averages of parameter lists and queues of keys, in place: one call, on CUDA one launch, for a whole list."""

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
from sslkernels._random import seed_tensor
from sslkernels.ops._registry import define
from sslkernels.reference import ema as reference

__all__ = ["ema_update_", "enqueue_"]

FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
FORMAT_RANKS = {torch.channels_last: 4, torch.channels_last_3d: 5}
AVERAGED = check.FLOATS
COPIED = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
ROUNDED = (torch.bfloat16, torch.float16)


def dense_format(x: Tensor) -> torch.memory_format | None:
    """The memory format in which `x` is dense; None if there is none."""
    fitting = (f for f in FORMATS if FORMAT_RANKS.get(f, x.ndim) == x.ndim)
    return next((f for f in fitting if x.is_contiguous(memory_format=f)), None)


def local_shards(target: Any, source: Any, target_name: str, source_name: str) -> tuple[Any, Any]:
    """The local shards of a pair of DTensors, which needs no communication where both are laid out alike."""
    kinds = [type(x).__name__ for x in (target, source)]
    if "DTensor" not in kinds:
        return target, source
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"{target_name} is a {kinds[0]} and {source_name} a {kinds[1]}: both or neither must be DTensors"
        )
    if target.placements != source.placements or target.device_mesh != source.device_mesh:
        raise ValueError(
            f"{source_name} must be placed as {target_name} ({target.placements} on {target.device_mesh}), "
            f"got {source.placements} on {source.device_mesh}"
        )
    return target.to_local(), source.to_local()


def _is_plain(target: Tensor, source: Tensor, device: torch.device) -> bool:
    """Whether a pair is of the usual kind, which needs no closer look: looking closer costs ten times as long."""
    return (
        isinstance(target, Tensor)
        and isinstance(source, Tensor)
        and target.dtype is source.dtype
        and target.dtype in AVERAGED
        and target.device == device
        and source.device == device
        and target.is_contiguous()
        and source.is_contiguous()
        and target.shape == source.shape
    )


def _check_pair(i: int, target: Tensor, source: Tensor, device: torch.device) -> None:
    for name, x in ((f"targets[{i}]", target), (f"sources[{i}]", source)):
        check.tensor(name, x)
        if x.dtype not in (*AVERAGED, *COPIED):
            raise TypeError(f"{name} must be float32, float64, bfloat16, float16, an integer or bool, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on the device of targets[0] ({device}), got {x.device}")
    if target.dtype != source.dtype and not (target.dtype in AVERAGED and source.dtype in AVERAGED):
        raise TypeError(
            f"integers and bools are copied: targets[{i}] and sources[{i}] must have one dtype, "
            f"got {target.dtype} and {source.dtype}"
        )
    if target.shape != source.shape:
        raise ValueError(
            f"sources[{i}] must have the shape of targets[{i}], {tuple(target.shape)}, got {tuple(source.shape)}"
        )
    if dense_format(target) is None:
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
        if check.readable(momentum):
            reference.check_momentum(momentum.item())
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
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum_tensor: Tensor | None,
    momentum: float,
    seed: Tensor | None,
) -> None:
    reference.ema_update_(targets, sources, momentum if momentum_tensor is None else momentum_tensor, seed)


_ema_update_ = define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor? momentum_tensor, float momentum, Tensor? seed) -> ()",
    reference=_reference,
    fake=None,
)
# without a kernel index_copy_ and copy_ serve, which are as fast as memory is
_enqueue_ = define(
    "enqueue_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys) -> ()",
    reference=reference.enqueue_,
    fake=None,
    everywhere=True,
)


def _is_real(x: Tensor) -> bool:
    """Whether x has memory, and is not a part of a graph in the making."""
    return not (torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor))


@torch.no_grad()
def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    momentum: Tensor | float,
    *,
    stochastic_rounding: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> None:
    """Move each target towards its source, in place: an exponential moving average of parameters.

        target <- momentum * target + (1 - momentum) * source        as target + (1 - momentum) (source - target)

    Arithmetic is float32, float64 where either tensor of a pair is. Pairs of integers or bools are copied, whatever the
    momentum. A 16-bit target rounded to nearest stops moving once a step is below half its spacing (momentum 0.996 is
    past that). `stochastic_rounding` rounds it to one of its two neighbours instead, each as likely as the exact value
    is near to the other: right on average, so it never stalls. Or keep float32 targets for 16-bit sources.

    Args:
        targets: tensors of any shapes, floating, integer or bool, on one device, contiguous or channels_last.
        sources: as many tensors, each of its target's shape; of any floating dtype where the target is floating, else
            of the target's dtype. Other strides cost a copy.
        momentum: in [0, 1]: a number, or one float32 or float64 element on the targets' device, which is read without
            a host sync. On the CPU a tensor outside [0, 1] raises; elsewhere it changes no target.
        stochastic_rounding: of bfloat16 and float16 targets; others have no use for it.
        generator, seed: of its random numbers: at most one of the two; neither draws from torch's generator. The same
            seed rounds alike on every device.

    DTensors are updated shard by shard where target and source are placed alike. No gradient flows.

    Raises:
        ValueError, TypeError: lists of different lengths; a pair of different shapes; a dtype, device, layout or
            momentum other than above; targets that overlap in memory; a seed without use. No target is written then.

    Example:
        >>> teacher, student = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> ema_update_(teacher.parameters(), student.parameters(), 0.996)

    Source: Polyak and Juditsky 1992; as in MoCo (arXiv:1911.05722) and BYOL (arXiv:2006.07733).
    """
    if not stochastic_rounding and (generator is not None or seed is not None):
        raise ValueError("generator and seed are of stochastic_rounding=True, which was not given")
    local_targets, local_sources = list(targets), list(sources)
    if len(local_targets) != len(local_sources):
        raise ValueError(
            f"targets and sources must have the same length, got {len(local_targets)} and {len(local_sources)}"
        )
    if not local_targets:
        if not isinstance(momentum, Tensor):
            _check_momentum(momentum, torch.device("cpu"))
        return
    if any(type(x).__name__ == "DTensor" for x in (*local_targets, *local_sources)):
        for i, pair in enumerate(zip(local_targets, local_sources, strict=True)):
            local_targets[i], local_sources[i] = local_shards(*pair, f"targets[{i}]", f"sources[{i}]")
    check.tensor("targets[0]", local_targets[0])
    device = local_targets[0].device
    for i, (target, source) in enumerate(zip(local_targets, local_sources, strict=True)):
        if not _is_plain(target, source, device):
            _check_pair(i, target, source, device)
            local_sources[i] = source.contiguous(memory_format=dense_format(target) or FORMATS[0])
    _check_momentum(momentum, device)
    real = _is_real(local_targets[0])
    if real:
        _check_overlap(local_targets, local_sources)
    rounds = stochastic_rounding and any(x.dtype in ROUNDED for x in local_targets)
    given = isinstance(momentum, Tensor)
    _ema_update_(
        local_targets,
        local_sources,
        momentum if given else None,
        math.nan if given else float(momentum),
        seed_tensor(seed, generator, device) if rounds else None,
    )
    if real:  # so that autograd notices a target that was saved for backward; a CUDA kernel does not tell it
        torch.autograd.graph.increment_version([x for x in local_targets if not x.is_inference()])


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write keys into a ring, in place; the oldest ones give way.

        queue[(pointer + j) % K] = keys[j]        for each j in order
        pointer = (pointer + N) % K

    Args:
        queue: (K, D), floating, of any strides.
        pointer: where the next key goes: one int64 element in [0, K), on the queue's device.
        keys: (N, D), of any floating dtype: converted as they are written. N may be 0, or larger than K: the last K
            keys stay then.

    Raises:
        ValueError, TypeError: other shapes, dtypes or devices; keys that overlap the queue in memory; a pointer outside
            [0, K) on the CPU (elsewhere nothing is written then). Nothing has been written.

    Example:
        >>> queue, pointer = torch.zeros(8, 2), torch.tensor(7)
        >>> enqueue_(queue, pointer, torch.ones(3, 2))
        >>> int(pointer), queue[:, 0].tolist()
        (2, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])

    Source: facebookresearch/moco `moco/builder.py::MoCo._dequeue_and_enqueue`; here any batch size is.
    """
    check.features(queue=queue, keys=keys)
    check.tensor("pointer", pointer)
    if pointer.numel() != 1 or pointer.dtype != torch.int64:
        raise ValueError(f"pointer must be one int64 element, got {pointer.dtype} {tuple(pointer.shape)}")
    check.same_device("pointer", pointer, "queue", queue)
    if queue.shape[0] == 0:
        raise ValueError(f"queue must have room for a key, got shape {tuple(queue.shape)}")
    real = _is_real(queue)
    if real and keys.untyped_storage().data_ptr() == queue.untyped_storage().data_ptr() and keys.numel():
        raise ValueError("keys must not lie in the memory of queue; pass keys.clone()")
    _enqueue_(queue, pointer, keys)
    if real:
        torch.autograd.graph.increment_version([x for x in (queue, pointer) if not x.is_inference()])
