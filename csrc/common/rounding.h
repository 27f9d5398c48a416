// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding of float32 to 16 bits: to one of the two neighbours, each as likely as the value is near to the
// other. The same bits on the CPU, on CUDA and in sslkernels/reference/ema.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace sslkernels {

// Away from zero where the word's upper half is below the distance from the neighbour towards zero, which is what the
// lower half of a float32 says. NaN stays NaN: the sum would carry into the sign.
SSLKERNELS_HOST_DEVICE inline uint16_t round_bfloat16(float x, uint32_t word) {
  uint32_t u;
  memcpy(&u, &x, sizeof(u));
  const uint32_t rounded = (u + (word >> 16)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

// Likewise by the lower 13 bits. A denormal cuts off more: its distance is compared with a uniform multiple of 2^-24.
SSLKERNELS_HOST_DEVICE inline uint16_t round_float16(float x, uint32_t word) {
  uint32_t u;
  memcpy(&u, &x, sizeof(u));
  const uint32_t magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t carried = magnitude + (word >> 19);
  const uint32_t normal = carried >= 0x47800000u ? 0x7c00u : (carried - 0x38000000u) >> 13;
  // choices by masks: of others GCC makes branches, and no vector instructions of the loop around them
  const uint32_t is_denormal = magnitude < 0x38800000u ? ~0u : 0u, is_nan = 0u - ((0x7f800000u - magnitude) >> 31);
  const uint32_t kept = magnitude & is_denormal;
  float scaled;
  memcpy(&scaled, &kept, sizeof(scaled));
  scaled *= 0x1p24f;  // in units of a denormal, below 2^10
  const int32_t floor = static_cast<int32_t>(scaled);
  const float uniform = static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
  const int32_t denormal = floor + static_cast<int32_t>(uniform < scaled - static_cast<float>(floor));
  const uint32_t value = (static_cast<uint32_t>(denormal) & is_denormal) | (normal & ~is_denormal);
  return static_cast<uint16_t>((value & ~is_nan) | (0x7e00u & is_nan) | sign);
}

}  // namespace sslkernels
