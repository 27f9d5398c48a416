// SPDX-License-Identifier: Apache-2.0
// The instruction sets that leaf functions are compiled for, and the one in use.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SSLKERNELS_MULTIVERSION 1
#endif

namespace sslkernels {

using i64 = int64_t;

enum class Level : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

enum class Dtype : int { kFloat, kDouble, kBFloat16, kHalf, kByte };

// The widest level that this processor runs and no cap forbids. SSLKERNELS_CPU_LEVEL (baseline, v3, v4) is the first
// cap.
Level level();
void set_level(Level cap);

}  // namespace sslkernels
