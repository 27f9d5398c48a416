# SPDX-License-Identifier: Apache-2.0
"""The emulator is exact where kernels rely on it, and ends the process where a kernel would be wrong on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).with_name("emulator")
MAIN = r"""
#include <cstdio>
#include <cstring>
#include <string>
#include "cuda_runtime.h"

template <int threads>
__global__ void sum_kernel(const int* x, int n, int* out) {
  __shared__ int warps[threads / 32];
  int mine = static_cast<int>(threadIdx.x) < n ? x[threadIdx.x] : 0;
  for (int step = 16; step > 0; step /= 2) mine += __shfl_down_sync(0xffffffff, mine, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    *out = 0;
    for (int warp : warps) *out += warp;
  }
}

__global__ void poison_kernel(int* out) {
  __shared__ int fixed[4];
  int* dynamic = reinterpret_cast<int*>(emulator::block.shared.data());
  out[2 * blockIdx.x] = fixed[3];
  out[2 * blockIdx.x + 1] = dynamic[3];
  fixed[3] = dynamic[3] = 1;
}

// lanes 8 to 15 have returned: they give nothing to a ballot, and a shuffle from them gives one's own
__global__ void partial_kernel(unsigned* out) {
  if (threadIdx.x >= 8 && threadIdx.x < 16) return;
  const unsigned votes = __ballot_sync(0xffff00ff, threadIdx.x % 2 == 0);
  const unsigned from = __shfl_xor_sync(0xffff00ff, threadIdx.x, 8);
  if (threadIdx.x == 0) out[0] = votes;
  if (threadIdx.x == 7) out[1] = from;
  if (threadIdx.x == 16) out[2] = from;
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncwarp();
  if (threadIdx.x == 40) __syncthreads();
  __syncwarp();
}

// who reads before thread 0 has written is left to chance: a barrier is missing
__global__ void race_kernel(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 42;
  out[threadIdx.x] = value;
}

__global__ void write_kernel(char* at) { *at = 1; }

int main(int, char** arguments) {
  const std::string test = arguments[1];
  if (test == "sum") {
    int x[100], out;
    for (int i = 0; i < 100; ++i) x[i] = i * i;
    emulator::run(1, 128, 0, [&] { sum_kernel<128>(x, 100, &out); });
    std::printf("%d\n", out);
  } else if (test == "poison") {
    int out[4];
    emulator::run(2, 1, 16, [&] { poison_kernel(out); });
    for (int x : out) std::printf("%x ", x);
  } else if (test == "partial") {
    unsigned out[3];
    emulator::run(1, 32, 0, [&] { partial_kernel(out); });
    std::printf("%x %u %u\n", out[0], out[1], out[2]);
  } else if (test == "race") {
    int out[256], late = 0;
    emulator::run(1, 256, 0, [&] { race_kernel(out); });
    for (int x : out) late += x == 42;
    std::printf("%s\n", late > 0 && late < 256 ? "seen" : "hidden");
  } else if (test == "divergent") {
    emulator::run(1, 64, 0, [&] { divergent_kernel(); });
  } else {
    char* memory = static_cast<char*>(emulator::allocate(100));
    emulator::run(1, 1, 0, [&] { write_kernel(memory + std::stoi(test)); });
    emulator::release(memory);
    std::printf("fine\n");
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "main.cpp").write_text(MAIN)
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wno-attributes", f"-I{EMULATOR}"]
    target = folder / "main"
    subprocess.run([*compiler.split(), *flags, str(folder / "main.cpp"), "-o", str(target)], check=True)
    return target


def run(program: Path, test: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, str(test)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("test", "printed"),
    [
        ("sum", str(sum(i * i for i in range(100)))),
        ("poison", "7f7f7f7f " * 4),  # what the first block wrote is gone in the second
        ("partial", "55550055 7 24"),
        ("race", "seen"),
        (0, "fine"),
        (99, "fine"),
    ],
)
def test_exact(program: Path, test: object, printed: str) -> None:
    done = run(program, test)
    assert (done.returncode, done.stdout.strip()) == (0, printed.strip()), done.stderr


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("divergent", "threads wait at different barriers"),
        (-1, "a write beside a tensor of 100 bytes, at byte -1"),
        (100, "a write beside a tensor of 100 bytes, at byte 100"),
        (112, ""),  # a page that cannot be touched
    ],
)
def test_wrong_kernels_end_the_process(program: Path, test: object, message: str) -> None:
    done = run(program, test)
    assert done.returncode < 0 and message in done.stderr
