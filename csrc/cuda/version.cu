// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "common/older_runtime.h"

#define SSLKERNELS_TEXT(...) SSLKERNELS_TEXT_(__VA_ARGS__)
#define SSLKERNELS_TEXT_(...) #__VA_ARGS__

// sslkernels/_library.py reads it from the file, before it decides to load it: "13020 for 800,900" is CUDA 13.2.
extern "C" __attribute__((visibility("default"), used)) const char sslkernels_cuda_version[] =
    "sslkernels: CUDA " SSLKERNELS_TEXT(CUDART_VERSION) " for " SSLKERNELS_TEXT(__CUDA_ARCH_LIST__);
