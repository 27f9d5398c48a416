// SPDX-License-Identifier: Apache-2.0
// Elements of every floating dtype in a kernel: how they are read in vectors, widened and rounded.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace sslkernels {

// `width` elements that one instruction reads where they are aligned; 16 bytes is the widest there is.
template <typename T, int width>
struct alignas(width * sizeof(T) < 16 ? width * sizeof(T) : 16) Vector {
  T values[width];
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of the widest access

template <typename T>
constexpr bool kNarrow = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;

// What an element is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(uint8_t x) { return static_cast<float>(x); }

// By way of float32, as torch converts float64 to 16 bits.
template <typename T, typename Real>
__device__ inline T narrow(Real x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace sslkernels
