# SPDX-License-Identifier: Apache-2.0
"""What the ranks compare before they exchange anything: which loss, its options, and every tensor but for its rows.

Collectives of unequal sizes abort the process (gloo) or hang (NCCL); numbers that differ give a wrong loss without a
word. So each rank sends a text of what it brings to all, in one exchange of 1 KiB, and all raise the same error.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sslkernels.distributed import _collectives as collectives
from sslkernels.ops._registry import define

WORDS = 128  # int64 numbers: whether the rank failed, the hash of its text, rows of its tensors, the text
ROWS = 14  # tensors whose leading sizes may differ between ranks
TEXT = (WORDS - 2 - ROWS) * 8  # bytes of the text that are sent

P = ParamSpec("P")
T = TypeVar("T")


def _describe(tensors: Sequence[Tensor], wanted: Sequence[bool], what: str, names: Sequence[str], numbers) -> str:
    """A line "name=value" for the loss, each option, each number and each tensor."""
    lines = [what]
    for i, (name, x, grad) in enumerate(zip(names, tensors, wanted)):
        sizes = ["rows" if axis == 0 and i < ROWS else str(size) for axis, size in enumerate(x.shape)]
        shape = f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
        dtype = str(x.dtype).removeprefix("torch.")
        lines.append(f"{name}={dtype} {shape} on {x.device.type}{', requires_grad' * grad}")
    lines += [f"{name}={number!r}" for name, number in zip(names[len(tensors) :], numbers)]
    return "\n".join(lines)


def _pack(failed: bool, rows: Sequence[int], text: str) -> Tensor:
    data = text.encode()
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")
    header = struct.pack(f"={2 + ROWS}q", failed, digest, *rows[:ROWS], *[0] * (ROWS - len(rows)))
    return torch.frombuffer(bytearray(header + data[:TEXT].ljust(TEXT, b"\0")), dtype=torch.int64)


def _text(words: Tensor) -> str:
    data = b"".join(word.to_bytes(8, sys.byteorder, signed=True) for word in words[2 + ROWS :].tolist())
    return data.rstrip(b"\0").decode(errors="replace")


def _leading(tensors: Sequence[Tensor]) -> list[int]:
    return [x.shape[0] if x.ndim else 1 for x in tensors]


def _tell(values: Sequence[Any], ranks: Sequence[int]) -> str:
    """ "a on ranks 0, 1; b on rank 2": what most ranks have comes first."""
    found: dict[Any, list[int]] = {}
    for rank, value in zip(ranks, values):
        found.setdefault(value, []).append(rank)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}" for value, r in ordered)


def _compare(table: Tensor, names: Sequence[str], ranks: Sequence[int], uneven: bool) -> None:
    """Raise where the rows differ, with the ranks and what differs."""
    failed, digests, *leading = zip(*table[:, : 2 + ROWS].tolist())
    if any(failed):
        first = failed.index(1)
        raise RuntimeError(f"rank {ranks[first]} raised {_text(table[first])}")
    if len(set(digests)) > 1:
        _tell_texts([_text(words) for words in table], ranks)
    rows = leading[0]
    most = rows.index(max(rows))
    for name, sizes in zip(names, leading):
        in_step = uneven and rows[most] > 0 and all(n * rows[most] == sizes[most] * r for n, r in zip(sizes, rows))
        if in_step or len(set(sizes)) == 1:
            continue
        what = _text(table[0]).split("\n")[0].removeprefix("loss=")
        hint = "" if uneven else "; batches of different sizes need check='step'"
        raise RuntimeError(f"{what}: the ranks disagree on the rows of {name}: {_tell(sizes, ranks)}{hint}")


def _tell_texts(texts: Sequence[str], ranks: Sequence[int]) -> NoReturn:
    fields = [dict(line.split("=", 1) for line in text.split("\n") if "=" in line) for text in texts]
    what = fields[0]["loss"]
    for name in dict.fromkeys(name for field in fields for name in field):
        values = [field.get(name, "none") for field in fields]
        if len(set(values)) > 1:
            matter = "the ranks call different losses" if name == "loss" else f"{what}: the ranks disagree on {name}"
            raise RuntimeError(f"{matter}: {_tell(values, ranks)}")
    raise RuntimeError(f"{what}: the ranks disagree on arguments beyond the {TEXT} bytes of text that they exchange")


def _exchange(words: Tensor, like: Tensor | None, world: int, group: str) -> Tensor:
    """What every rank describes, (world, WORDS), on the CPU."""
    device = "cpu" if collectives.has_cpu_backend(group) else "cuda" if like is None else like.device
    return collectives.gather_words(words.to(device), world, group).cpu()


def _agree(xs, wanted, what, names, numbers, world, group) -> Tensor:
    _Exchanges.count += 1
    words = _pack(False, _leading(xs), _describe(xs, wanted, what, names, numbers))
    table = _exchange(words, xs[0], world, group)
    _compare(table, names, collectives.ranks_of(group), uneven=True)
    return table[:, 2].clone()


# The rows of each rank, (world,) int64 on the CPU. An op, so that compiled code compares too, whenever it runs.
agree = define(
    "distributed_agree(Tensor[] xs, bool[] wanted, str what, str[] names, float[] numbers, SymInt world, str group)"
    " -> Tensor",
    reference=_agree,
    fake=lambda xs, wanted, what, names, numbers, world, group: torch.empty(world, dtype=torch.int64),
    everywhere=True,
)

_agreed: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()  # by group


def agree_once(
    xs: Sequence[Tensor], what: str, names: Sequence[str], numbers: Sequence[float], world: int, group: str
) -> None:
    """Compare what ranks bring at the first call with these shapes and options; their rows must be equal.

    Numbers are compared then too, and are no reason to compare again: a schedule has another one in every step.
    """
    wanted = [x.requires_grad for x in xs]
    rows = _leading(xs)
    key = (_describe(xs, wanted, what, names, []), *rows)
    agreed = _agreed.setdefault(collectives.find(group), set())
    if key not in agreed:
        _Exchanges.count += 1
        text = _describe(xs, wanted, what, names, numbers)
        table = _exchange(_pack(False, rows, text), xs[0], world, group)
        _compare(table, names, collectives.ranks_of(group), uneven=False)
        agreed.add(key)


class _Exchanges:
    count = 0  # of this process, so that an error knows whether it came before its call's


def raises_together(function: Callable[P, T]) -> Callable[P, T]:
    """A loss whose error, where a rank has it before the ranks compare, is an error on all of them.

    Without it the others would wait for that rank until the group's timeout. With `check="first"`, or while a compiler
    traces, nobody listens, and they do.
    """

    @wraps(function)
    def together(*args: P.args, **kwargs: P.kwargs) -> T:
        if kwargs.get("process_group") is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        before = _Exchanges.count
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if _Exchanges.count == before:
                _announce(function.__name__, error, kwargs["process_group"])
            raise

    return together


def _announce(what: str, error: Exception, process_group: Any) -> None:
    from sslkernels.distributed._group import span

    try:
        name, _, world, _, check = span(process_group)
    except Exception:
        return  # of the error that is raised: no group to tell
    if world > 1 and check == "step":
        _Exchanges.count += 1
        text = f"{type(error).__name__} in {what}: {error}"
        with suppress(RuntimeError):  # that others are gone is not the error here
            _exchange(_pack(True, [], text), None, world, name)
