// SPDX-License-Identifier: Apache-2.0
// What the CPU library tells about itself: the instruction set in use, and a cap on it for tests.
#include <torch/csrc/stable/library.h>

#include "common/older_runtime.h"
#include "cpu/tiles.h"

namespace sslkernels {

namespace {

i64 cpu_level() { return static_cast<i64>(level()); }

void set_cpu_level(i64 cap) {
  STD_TORCH_CHECK(cap >= 0 && cap <= static_cast<i64>(Level::kV4), "cpu level must be 0 (baseline), 1 (v3) or 2 (v4)");
  set_level(static_cast<Level>(cap));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels, library) {
  library.def("cpu_level() -> int");
  library.def("set_cpu_level(int cap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_level", TORCH_BOX(&cpu_level));
  library.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
}

}  // namespace sslkernels
