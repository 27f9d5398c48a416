// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "cuda/driver.h"

namespace sslkernels {
namespace {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

bool driver_serves() { return driver_version() == 0 || driver_version() / 1000 >= CUDART_VERSION / 1000; }

}  // namespace sslkernels

// Read by sslkernels/_library.py through ctypes: 13020 is CUDA 13.2, a driver of 0 is none.
extern "C" __attribute__((visibility("default"))) void sslkernels_cuda_versions(int* runtime, int* driver) {
  *runtime = CUDART_VERSION;
  *driver = sslkernels::driver_version();
}
