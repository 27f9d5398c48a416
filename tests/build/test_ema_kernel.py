# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of ema_update_, block by block and thread by thread on the CPU, against the reference. No GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkernels.reference import ema as reference

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 4095, 4096, 0, 4101, 0)  # 4096 elements are a block; only whole, aligned blocks take vector loads
# What the kernel takes of CUDA, in terms of the CPU; a conversion is the processor's own or, for bfloat16, add and cut.
SHIM = r"""
#pragma once
#include <cstdint>
#include <cstring>
#define __device__
#define __global__
#define __host__
#define __grid_constant__
#define __launch_bounds__(threads)
struct Index { unsigned x; };
inline Index threadIdx, blockIdx;
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float __half2float(__half x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half __float2half_rn(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  __half z;
  std::memcpy(&z, &y, 2);
  return z;
}
"""
MAIN = r"""
#include "cuda/ema_kernel.h"
using namespace sslkernels;
extern "C" void launch(int count, void** targets, const void** sources, const int64_t* numels, const int* target_types,
                       const int* source_types, const double* momentum, const uint64_t* seed, int first_stream) {
  Table<kSmall> table;
  uint32_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    table.target[i] = targets[i];
    table.source[i] = sources[i];
    table.numel[i] = numels[i];
    table.first_block[i] = blocks;
    table.target_type[i] = static_cast<Type>(target_types[i]);
    table.source_type[i] = static_cast<Type>(source_types[i]);
    blocks += static_cast<uint32_t>(blocks_for(numels[i]));
  }
  table.count = count;
  table.first_stream = static_cast<uint32_t>(first_stream);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) ema_kernel(table, {momentum, true, 0.0}, seed);
  }
}
"""
TYPES: dict[torch.dtype, int] = {dtype: i for i, dtype in enumerate(DTYPES)}
TYPES |= {torch.bool: 4, torch.uint8: 4, torch.int8: 4, torch.int16: 5, torch.int32: 6, torch.int64: 7}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder: Path = tmp_path_factory.mktemp("ema")
    for name in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).write_text('#include "shim.h"\n')
    (folder / "shim.h").write_text(SHIM)
    (folder / "main.cpp").write_text(MAIN)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(folder / "main.cpp"), "-o", str(folder / "ema.so")], check=True)
    return ctypes.CDLL(str(folder / "ema.so")).launch


def launch(kernel: Any, targets: list[Tensor], sources: list[Tensor], momentum: float, seed: int | None) -> None:
    n = len(targets)

    def pointers(tensors: list[Tensor]) -> Any:
        return (ctypes.c_void_p * n)(*(x.data_ptr() for x in tensors))

    def types(tensors: list[Tensor]) -> Any:
        return (ctypes.c_int * n)(*(TYPES[x.dtype] for x in tensors))

    numels = (ctypes.c_int64 * n)(*(x.numel() for x in targets))
    m, s = ctypes.c_double(momentum), ctypes.c_int64(seed or 0)
    chosen = None if seed is None else ctypes.byref(s)
    kernel(n, pointers(targets), pointers(sources), numels, types(targets), types(sources), ctypes.byref(m), chosen, 0)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("seed", [None, 3, 2**63 - 1], ids=["nearest", "stochastic", "large seed"])
@pytest.mark.parametrize(("target", "source"), list(product(DTYPES, DTYPES)), ids=lambda x: str(x)[6:])
def test_bits_of_the_reference(kernel: Any, target: torch.dtype, source: torch.dtype, seed: int | None) -> None:
    targets = [(torch.randn(n) * 10.0 ** (-i)).to(target) for i, n in enumerate(SIZES)]
    sources = [(torch.randn(n) * 10.0 ** (-i)).to(source) for i, n in enumerate(SIZES)]
    targets += [torch.tensor([torch.nan, torch.inf, 0.0, 65504.0]).to(target), torch.randn(4097).to(target)[1:]]
    sources += [torch.tensor([1.0, 1.0, torch.nan, 65519.0]).to(source), torch.randn(4096).to(source)]  # one unaligned
    for momentum in (0.999, 0.25):
        expected = [x.clone() for x in targets]
        reference.ema_update_(expected, sources, momentum, None if seed is None else torch.tensor(seed))
        launch(kernel, targets, sources, momentum, seed)
        assert all(map(same, targets, expected))


def test_copies(kernel: Any) -> None:
    sources = [torch.randint(-99, 99, (5000,)).to(dtype) for dtype in list(TYPES)[4:]]
    targets = [torch.zeros_like(x) for x in sources]
    launch(kernel, targets, sources, 0.9, None)
    assert all(map(torch.equal, targets, sources))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_invalid_momentum_writes_nothing(kernel: Any, momentum: float) -> None:
    targets = [torch.zeros(9), torch.zeros(9, dtype=torch.int64)]
    launch(kernel, targets, [x + 1 for x in targets], momentum, None)
    assert not any(x.any() for x in targets)
