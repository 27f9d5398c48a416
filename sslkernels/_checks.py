# SPDX-License-Identifier: Apache-2.0
"""Argument checks: shape, dtype, device and Python numbers, by name and with what came. No values inside tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class check_values:
    """Also check values inside CUDA tensors (indices, labels), which synchronises the device. Call or context manager.

    Without it a bad value on a CUDA device makes the outputs that depend on it NaN; on the CPU it always raises.

    Example:
        >>> with check_values():
        ...     pass  # a bad index on any device raises here
        >>> check_values(False)
        check_values(False)
    """

    enabled = False

    def __init__(self, enabled: bool = True) -> None:
        self.previous, check_values.enabled = check_values.enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        check_values.enabled = self.previous

    def __repr__(self) -> str:
        return f"check_values({check_values.enabled})"


def readable(x: Tensor) -> bool:
    """Whether the values of x may be read here: not in a graph, not of a fake, and on a device only if asked for."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and (x.device.type == "cpu" or (check_values.enabled and x.device.type != "meta"))


def features(**tensors: Any) -> None:
    """Each argument is a floating (rows, D) tensor; all have one D and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        tensor(name, x)
        if x.ndim != 2:
            raise ValueError(f"{name} must be 2-D (rows, features), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name} must have as many features as {first_name} ({first.shape[1]}), got shape {tuple(x.shape)}"
            )
        same_device(name, x, first_name, first)


def tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    # by name: importing torch.distributed.tensor here would double the import time of the package
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor, which has no sharding rule here; pass {name}.to_local()")


def floating(name: str, x: Any) -> None:
    tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {x.device}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}), got {x.dtype}")


def vector(name: str, x: Any, rows: int, like: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """`x` is a (rows,) tensor on the device of `like`, of one of `dtypes`."""
    tensor(name, x)
    if x.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def mask(x: Any, shape: Sequence[int], like: Tensor) -> None:
    """`mask` is a bool tensor of that shape on the device of `like`, or None."""
    if x is None:
        return
    tensor("mask", x)
    if x.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"mask must be on {like.device}, got {x.device}")


def number(name: str, x: Any, like: Tensor) -> None:
    """`x` is a finite Python number, or a floating tensor of one element on the device of `like`."""
    if isinstance(x, Tensor):
        tensor(name, x)
        if x.numel() != 1 or not x.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor of one element, got {x.dtype} {tuple(x.shape)}")
        if x.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    elif isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {type(x).__name__}")
    else:
        finite(name, x)


def finite(name: str, x: Any) -> None:
    """A finite Python number. A tensor is refused, whose value could not be had without waiting for its device."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not -math.inf < x < math.inf:  # math.isfinite does not trace a symbolic number
        raise ValueError(f"{name} must be finite, got {x}")


def positive(name: str, x: Any) -> None:
    """A finite Python number above zero, no tensor."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not 0 < x < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {x}")


def in_range(name: str, x: Any, low: float, high: float) -> None:
    """low <= x < high."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not low <= x < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {x}")


def choice(name: str, x: Any, choices: Sequence[str]) -> None:
    if x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {x!r}")


def not_empty(name: str, x: Tensor) -> None:
    if x.shape[0] == 0:
        raise ValueError(f"{name} must not be an empty batch, got shape {tuple(x.shape)}")


def ids(name: str, x: Tensor, length: int, distinct: bool = False, ignore: int | None = None) -> None:
    """The values of int64 (..., K), where they may be read, are in [0, length), or `ignore`; `distinct`: no row has one
    twice."""
    if not readable(x):
        return
    x = x if ignore is None else x[x != ignore]
    if x.numel() == 0:
        return
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= length:
        allowed = f"in [0, {length})" + ("" if ignore is None else f" or {ignore}, which is ignored")
        raise ValueError(f"{name} must be {allowed}, got {low if low < 0 else high}")
    if distinct:
        ordered = x.sort(-1).values
        again = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if again.numel():
            raise ValueError(f"{name} must not repeat within a sample, got {int(again[0])} more than once")


def integer(name: str, x: Any, low: int, high: int | None = None) -> None:
    """A Python integer with low <= x, and x <= high where that is given."""
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
    if x < low or (high is not None and x > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in [{low}, {high}]'}, got {x}")


def integers(name: str, x: Any, count: int, low: int) -> tuple[int, ...]:
    """`count` Python integers, each at least `low`, as a tuple."""
    if not isinstance(x, Sequence) or len(x) != count:
        raise ValueError(f"{name} must be {count} integers, got {x!r}")
    for i, number_ in enumerate(x):
        integer(f"{name}[{i}]", number_, low)
    return tuple(x)


def interval(name: str, x: Any, low: float, high: float) -> tuple[float, float]:
    """A pair (a, b) of numbers with low < a <= b <= high, as a tuple of floats."""
    if not isinstance(x, Sequence) or len(x) != 2:
        raise ValueError(f"{name} must be a pair (smallest, largest), got {x!r}")
    for i, number_ in enumerate(x):
        if isinstance(number_, bool) or not isinstance(number_, int | float):
            raise TypeError(f"{name}[{i}] must be a number, got {type(number_).__name__}")
    if not low < x[0] <= x[1] <= high or not x[1] < math.inf:
        raise ValueError(f"{name} must rise within ({low}, {high}], got {tuple(x)}")
    return float(x[0]), float(x[1])


def ratio(name: str, x: Any) -> None:
    """0 < x < 1."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not 0 < x < 1:
        raise ValueError(f"{name} must be in (0, 1), got {x}")
