# SPDX-License-Identifier: Apache-2.0
"""csrc/common/divide.h divides every n < 2^31 by every divisor. Needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = r"""
#include <cstdio>
#include <initializer_list>
#include "common/divide.h"
int main() {
  const uint32_t last = (uint32_t{1} << 31) - 1;
  uint32_t word = 1;
  for (uint32_t i = 0; i < 40000; ++i) {
    word = word * 1664525 + 1013904223;
    // all small divisors, then powers of two and their neighbours, then any
    uint32_t d = i < 5000 ? i + 1 : word >> (1 + i % 24);
    if (i >= 5000 && i < 5093) d = (uint32_t{1} << (i - 5000) / 3) + (i - 5000) % 3 - 1;
    d = d == 0 ? 1 : d > last ? last : d;
    const sslkernels::Divider divider(d);
    const uint32_t top = last / d * d;  // the quotient changes at multiples
    for (uint32_t n : {uint32_t{0}, d - 1, d, top - 1, top, last, word >> 1, (word >> 1) / d * d}) {
      if (n <= last && divider.quotient(n) != n / d) {
        std::printf("%u / %u\n", n, d);
        return 1;
      }
    }
  }
}
"""


def test_every_quotient(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (tmp_path / "main.cpp").write_text(MAIN)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")], check=True)
    wrong = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert wrong.returncode == 0, wrong.stdout
