// SPDX-License-Identifier: Apache-2.0
// How often each frame draws each other one; sslkernels/reference/_distractors.py defines it, word for word.
#include "common/philox.h"
#include "cpu/operand.h"

namespace sslkernels {

namespace {

Tensor distractor_counts(const Tensor& seed_tensor, const Tensor& lengths_tensor, i64 length, i64 count) {
  const uint64_t seed = *static_cast<const uint64_t*>(seed_tensor.const_data_ptr());
  const Tensor dense = torch::stable::contiguous(lengths_tensor);
  const i64* lengths = static_cast<const i64*>(dense.const_data_ptr());
  const i64 batch = dense.size(0);
  Tensor out = empty({batch, length, length}, ScalarType::Float);
  constexpr double kFlopsADraw = 200;
  over_rows(batch * length, batch * length * (kFlopsADraw * count + kFlopsAnElement * length), [&](Range rows) {
    for (i64 row = rows.begin; row < rows.end; ++row) {
      const i64 b = row / length, i = row % length, n = std::clamp<i64>(lengths[b], 0, length);
      float* counts = data<float>(out) + row * length;
      std::fill_n(counts, length, 0.0f);
      if (i >= n || n < 2)
        continue;
      Philox block;
      for (i64 c = 0; c < count; ++c) {
        const i64 word = i * count + c;
        if (c == 0 || word % 4 == 0)
          block = philox(seed, b, word / 4);
        const i64 other = below(block.words[word % 4], n - 1);
        counts[other + (other >= i)] += 1;
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("distractor_counts", TORCH_BOX(&distractor_counts));
}

}  // namespace sslkernels
