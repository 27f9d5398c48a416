// SPDX-License-Identifier: Apache-2.0
// Marks what the host and, under nvcc, the device may call, and what is the device's alone there.
#pragma once

#if defined(__CUDACC__)
#define SSLKERNELS_HOST_DEVICE __host__ __device__
#define SSLKERNELS_DEVICE __device__
#else
#define SSLKERNELS_HOST_DEVICE
#define SSLKERNELS_DEVICE
#endif
