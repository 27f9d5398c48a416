// SPDX-License-Identifier: Apache-2.0
// What the CPU library tells about itself.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  (void)library;
}
