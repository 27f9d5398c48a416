// SPDX-License-Identifier: Apache-2.0
// Keeps a thread's arithmetic away from denormals.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace sslkernels {

// While it lives, this thread rounds what would become a denormal to zero: far below the rounding of any sum here, a
// product that becomes one costs as much as a hundred others on x86.
class NoDenormals {
 public:
#ifdef __x86_64__
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000); }
  ~NoDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  NoDenormals() {}  // so that none is an unused variable
#endif
};

}  // namespace sslkernels
