# SPDX-License-Identifier: Apache-2.0
"""The moving-average primitives in plain PyTorch: the definition. Any device, any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslkernels.reference import _philox


def check_momentum(momentum: float) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor | float, seed: Tensor | None = None
) -> None:
    """target <- momentum * target + (1 - momentum) * source, pair by pair, in place; integers and bools are copied.

    Arithmetic is float32, float64 where either tensor of a pair is; each product and each sum is rounded by itself, so
    that every implementation has the same bits. The result is rounded to the target's dtype: to nearest, or, with a
    seed, `round_stochastically` for 16-bit targets: word n of stream i for element n (in the order of memory) of
    targets[i]. A momentum tensor outside [0, 1] raises if it is on the CPU, and changes no target elsewhere.
    """
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu":
        momentum = momentum.item()
    valid = None
    if isinstance(momentum, Tensor):
        momentum = momentum.reshape(())
        valid = (momentum >= 0) & (momentum <= 1)
    else:
        check_momentum(momentum)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        new = source
        if target.is_floating_point():
            new = _between(target, source, momentum)
            if seed is not None and target.dtype in (torch.bfloat16, torch.float16):
                new = round_stochastically(new.float(), target.dtype, _words(seed, i, target))
        target.copy_(new if valid is None else torch.where(valid, new.to(target.dtype), target))


def _between(target: Tensor, source: Tensor, momentum: Tensor | float) -> Tensor:
    """Computed from the nearer end, as torch.lerp does it, so that both ends are exact."""
    dtype = torch.float64 if torch.float64 in (target.dtype, source.dtype) else torch.float32
    a, b = target.to(dtype), source.to(dtype)
    weight = 1 - momentum
    if isinstance(weight, Tensor):
        near, far = a + weight.to(dtype) * (b - a), b - momentum.to(dtype) * (b - a)  # type: ignore[union-attr]
        return torch.where(weight.to(dtype) < 0.5, near, far)
    # a number meets float32 tensors as a float32, so compare it as one
    small = torch.tensor(weight, dtype=dtype).item() < 0.5
    return a + weight * (b - a) if small else b - momentum * (b - a)


def _words(seed: Tensor, stream: int, x: Tensor) -> Tensor:
    """A random word for each element of x, numbered in the order of memory."""
    order = sorted(range(x.ndim), key=lambda d: x.stride(d), reverse=True)
    numbers = torch.arange(x.numel(), device=x.device).reshape([x.shape[d] for d in order])
    inverse = sorted(range(x.ndim), key=order.__getitem__)
    return _philox.words(seed, torch.full((), stream, device=x.device), numbers.permute(inverse))


def round_stochastically(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """float32 x as bfloat16 or float16: one of its two neighbours there, each as likely as x is near to the other.

    `words` (of x's shape, int64 in [0, 2^32)) decide: away from zero where they are below the distance from the inner
    neighbour, in units of the last place. Exact but for float16's denormals, whose odds are a multiple of 2^-24. What
    dtype has stays itself, and so do infinity and NaN.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    if dtype == torch.bfloat16:
        rounded = (magnitude + (words >> 16)) >> 16
        rounded = torch.where(nan, magnitude >> 16 | 0x40, rounded)
    else:
        normal = magnitude + (words >> 19)
        normal = torch.where(normal >= 0x47800000, 0x7C00, (normal - 0x38000000) >> 13)
        scaled = x.abs() * 2.0**24  # in units of a denormal; exact
        floor = torch.where(magnitude < 0x38800000, scaled, 0.0).floor()
        denormal = floor.to(torch.int64) + (_philox.uniform(words) < scaled - floor)
        rounded = torch.where(magnitude < 0x38800000, denormal, normal)
        rounded = torch.where(nan, 0x7E00, rounded)
    pattern = rounded | sign >> 16
    return torch.where(pattern >= 0x8000, pattern - 0x10000, pattern).to(torch.int16).view(dtype)


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """queue[(pointer + j) % K] = keys[j] for each j in order, then pointer = (pointer + len(keys)) % K.

    A pointer outside [0, K) raises if it is on the CPU, and changes nothing elsewhere.
    """
    size, count = queue.shape[0], keys.shape[0]
    last = keys[-size:]  # of more keys than the queue holds only the end survives
    skipped = count - last.shape[0]
    if pointer.device.type == "cpu":
        at = int(pointer)
        if not 0 <= at < size:
            raise ValueError(f"pointer must be in [0, {size}), got {at}")
        at = (at + skipped) % size
        head = min(size - at, last.shape[0])
        queue[at : at + head].copy_(last[:head])
        queue[: last.shape[0] - head].copy_(last[head:])
        pointer.fill_((at + last.shape[0]) % size)
        return
    valid = (pointer >= 0) & (pointer < size)
    slots = (pointer + skipped + torch.arange(last.shape[0], device=keys.device)) % size
    queue.index_copy_(0, slots, torch.where(valid, last.to(queue.dtype), queue[slots]))
    pointer.copy_(torch.where(valid, (pointer + count) % size, pointer))
