// SPDX-License-Identifier: Apache-2.0
// Compiles the leaf functions of the file that SSLKERNELS_LEAVES names once for each instruction set:
//
//   #define SSLKERNELS_LEAVES "cpu/patches.inl"
//   #include "cpu/multiversion.inl"
//   ... SSLKERNELS_AT_LEVEL(sum_row(x, n)) ...            calls the one that fits this processor
//
// The includer is outside any namespace, and has included what the leaves need: no header may be seen first in here.
// For intrinsics a leaf asks SSLKERNELS_LEVEL (as in levels.h): in C++, GCC before 13 does not define __AVX2__ and its
// like under `pragma target`.
#include "cpu/levels.h"

namespace sslkernels {
namespace {  // each family has its own leaves

#define SSLKERNELS_LEVEL 0
namespace baseline {
#include "cpu/leaf.inl"
#include SSLKERNELS_LEAVES
}  // namespace baseline

#ifdef SSLKERNELS_MULTIVERSION
#undef LEAF
#undef INLINE
#undef SSLKERNELS_LEVEL
#define SSLKERNELS_LEVEL 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#include "cpu/leaf.inl"
#include SSLKERNELS_LEAVES
}  // namespace v3
#pragma GCC pop_options

#undef LEAF
#undef INLINE
#undef SSLKERNELS_LEVEL
#define SSLKERNELS_LEVEL 2
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#include "cpu/leaf.inl"
#include SSLKERNELS_LEAVES
}  // namespace v4
#pragma GCC pop_options
#else
namespace v3 = baseline;
namespace v4 = baseline;
#endif

#undef LEAF
#undef INLINE
#undef SSLKERNELS_LEVEL

}  // namespace
}  // namespace sslkernels

#define SSLKERNELS_AT_LEVEL(call) (level() == Level::kV4 ? v4::call : level() == Level::kV3 ? v3::call : baseline::call)
