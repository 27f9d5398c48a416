// SPDX-License-Identifier: Apache-2.0
// What the regression kernels hand to their leaves; what they compute is defined in sslkernels/reference/regression.py.
#pragma once

#include "cpu/operand.h"

namespace sslkernels {

enum class Distance { kSmoothL1, kL1, kL2, kCosine, kNormalizedL2 };

template <typename T>
struct Regression {
  Distance distance;
  bool normalize_target;
  T beta, eps;
};

}  // namespace sslkernels
