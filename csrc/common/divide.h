// SPDX-License-Identifier: Apache-2.0
// Division by a number that a kernel is told at its launch, as a multiplication and a shift (Granlund and Montgomery
// 1994): a GPU has no instruction for it.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sslkernels {

// n / divisor for n < 2^31; a divisor of 0 counts as 1.
struct Divider {
  Divider() = default;
  explicit Divider(uint64_t d) : divisor(d > 1 ? static_cast<uint32_t>(d) : 1) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  SSLKERNELS_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>((uint64_t{n} * factor) >> 32) + n) >> shift;
  }

  uint32_t divisor = 1, factor = 1, shift = 0;
};

}  // namespace sslkernels
