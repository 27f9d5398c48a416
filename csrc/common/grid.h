// SPDX-License-Identifier: Apache-2.0
// How much work becomes how many thread blocks. Host arithmetic, free of CUDA and torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sslkernels {

constexpr int64_t kMaxGrid = (1LL << 31) - 1;  // CUDA's limit on gridDim.x

// Blocks of `threads` for `count` elements of work, in a grid that one launch can hold; a kernel strides over the rest.
inline unsigned blocks_of(int64_t count, int threads, int64_t most = kMaxGrid) {
  return static_cast<unsigned>(std::min(count / threads + (count % threads != 0), most));
}

// A matrix in strips of columns, each in parts of `rows` rows.
struct Parts {
  int64_t strips, count, rows;
};

// As many parts as give each multiprocessor two blocks, but one where strips alone give it nearly one: that needs a
// launch less and finds rows in the cache again. A part has at least kRows rows.
inline Parts plan_parts(int64_t rows, int64_t cols, int64_t strip, int64_t multiprocessors) {
  constexpr int64_t kRows = 128;
  const int64_t strips = cols / strip + (cols % strip != 0);
  const int64_t wanted = 4 * strips >= 3 * multiprocessors ? 1 : 2 * multiprocessors / std::max<int64_t>(strips, 1);
  const int64_t most = std::min(wanted, rows / kRows);
  const int64_t each = most > 1 ? (rows + most - 1) / most : rows;
  return {strips, each > 0 ? (rows + each - 1) / each : 1, each};
}

}  // namespace sslkernels
