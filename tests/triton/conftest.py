# SPDX-License-Identifier: Apache-2.0
"""Calls a Triton launcher on CPU tensors, where its kernels run in Triton's interpreter, beside the reference."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sslkernels.ops  # noqa: F401  defines the ops
from sslkernels.triton import KERNELS

REFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
# relative to the largest element: a sum of roundings in the dtype that comes out
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("a GPU is here: tests/gpu runs the kernels on it")


def launcher(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"sslkernels.triton.{KERNELS[name]}"), name)


def doubled(x: Any) -> Any:
    """Floating tensors as float64, inside lists too."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return [doubled(y) for y in x] if isinstance(x, list) and x and isinstance(x[0], Tensor) else x


def tensors(outputs: Any) -> Iterable[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


@pytest.fixture
def compare() -> Callable[..., None]:
    """`compare(name, *arguments, tolerance=None)`: launcher and reference, which computes in float64 and rounds once.

    Shapes and dtypes agree, infinities and NaNs are in the same places, and no element differs by more than the
    tolerance times the largest.
    """

    def call(name: str, *arguments: Any, tolerance: float | None = None) -> None:
        op = getattr(torch.ops.sslkernels, name).default
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the reference, which announces itself
            found = launcher(name)(*arguments)
            dtypes = [x.dtype for x in tensors(op.redispatch(REFERENCE, *arguments))]
            expected = op.redispatch(REFERENCE, *map(doubled, arguments))
        for i, (a, b, dtype) in enumerate(zip(tensors(found), tensors(expected), dtypes, strict=True)):
            assert (a.shape, a.dtype) == (b.shape, dtype), (name, i)
            if not dtype.is_floating_point:
                assert torch.equal(a, b), (name, i)
                continue
            wide, b = a.double(), b.to(dtype).double()
            assert torch.equal(wide.isnan(), b.isnan()) and torch.equal(wide.isinf(), b.isinf()), (name, i)
            finite = b.isfinite()
            assert torch.equal(wide[~finite].nan_to_num(0, 1, -1), b[~finite].nan_to_num(0, 1, -1)), (name, i)
            if finite.any():
                error = (wide - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1e-30)
                assert error <= (tolerance or TOLERANCE[dtype]), (name, i, error.item())

    return call


@pytest.fixture
def triton_serves() -> Iterator[Callable[[], set[str]]]:
    """CPU tensors are served by the launchers in this test, float64 by the reference; called, it names what ran."""
    library = torch.library.Library("sslkernels", "IMPL")
    ran: set[str] = set()

    def noted(name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if any(x.dtype == torch.float64 for xs in arguments for x in (xs if isinstance(xs, list) else [xs])
                   if isinstance(x, Tensor)):  # fmt: skip
                return getattr(torch.ops.sslkernels, name).default.redispatch(REFERENCE, *arguments)
            ran.add(name)
            return launcher(name)(*arguments)

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that a kernel is replaced, the reference that it serves
        for name in KERNELS:
            library.impl(name, noted(name), "CPU", allow_override=True)
        yield lambda: ran
    library._destroy()
