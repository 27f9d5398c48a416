# SPDX-License-Identifier: Apache-2.0
"""The modules that a function holds."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["modules_of"]

LEVELS = 5  # a lambda, the method that it calls, the object of that, its list, the module
MOST = 100  # items of a container: a data set in a closure holds no modules


def modules_of(model: Any) -> list[nn.Module]:
    """The module that `model` is; of a function those that its code can reach, each once.

    That is what is bound to it or in its closure, its defaults and the globals that it names: modules there, in short
    lists, tuples and dicts, and in the attributes that the code names of other objects; functions there are looked
    into as well, as are the parts of a `functools.partial`. What is reached otherwise, by `getattr` of a computed name
    say, is not found.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[tuple[int, Any], Any] = {}  # with the objects, whose ids others would have
    level: list[tuple[Any, tuple[str, ...]]] = [(model, ())]
    for _ in range(LEVELS):
        further: list[tuple[Any, tuple[str, ...]]] = []
        for x, names in level:
            if isinstance(x, nn.Module):
                found[id(x)] = x
            elif (id(x), names) not in seen:
                seen[id(x), names] = x
                further += _parts(x, names)
        level = further
    return list(found.values())


def _parts(x: Any, names: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """What x holds, each with the names that the code which has x uses."""
    if x is None or isinstance(x, torch.Tensor | type | str | bytes | int | float):
        return
    if isinstance(x, functools.partial):
        yield from ((part, names) for part in (x.func, *x.args, *x.keywords.values()))
    elif isinstance(x, MethodType):
        yield x.__func__, ()
        yield x.__self__, _names(x.__func__)
    elif isinstance(x, FunctionType):
        yield from _held(x)
    elif isinstance(x, list | tuple | set | Mapping):
        if len(x) <= MOST:
            yield from ((part, names) for part in (x.values() if isinstance(x, Mapping) else x))
    elif not _is_library(x.__name__ if isinstance(x, ModuleType) else type(x).__module__):
        yield from _attributes(x, (*names, "__call__"))


def _held(function: FunctionType) -> Iterator[tuple[Any, tuple[str, ...]]]:
    if _is_library(function.__module__):
        return
    attributes, global_names = _named(function.__code__)
    if not _is_library(function.__globals__.get("__name__")):  # as of torch's wrapper around a function
        yield from ((function.__globals__[name], attributes) for name in global_names if name in function.__globals__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents, attributes
        except ValueError:  # not assigned yet
            continue
    yield from ((part, attributes) for part in function.__defaults__ or ())
    yield from ((part, attributes) for part in (function.__kwdefaults__ or {}).values())


def _attributes(x: Any, names: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Those of these names; a method or property may use others of x."""
    for name in names:
        part = inspect.getattr_static(x, name, None)
        part = part.fget if isinstance(part, property) else part
        part = part.__func__ if isinstance(part, staticmethod | classmethod) else part
        yield part, names
        if isinstance(part, FunctionType):
            yield x, _names(part)


def _is_library(module: str | None) -> bool:
    """Whether what is of this module holds no others' modules, and much else."""
    return (module or "").partition(".")[0] in ("torch", "sslkernels")


def _names(function: Any) -> tuple[str, ...]:
    return _named(function.__code__)[0] if isinstance(function, FunctionType) else ()


@functools.lru_cache(maxsize=1024)
def _named(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All names in the code, attributes among them, and the globals; of the functions within too."""
    names = set(code.co_names)
    global_names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _named(inner)
            names.update(more[0])
            global_names.update(more[1])
    return tuple(sorted(names)), tuple(sorted(global_names))
