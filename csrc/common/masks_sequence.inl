// SPDX-License-Identifier: Apache-2.0
// The masks of sequences as the dispatcher calls them, on any device: included where run_samples() says how to work
// there, empty_like() makes tensors, and numbers() sends a list there.
#include <tuple>
#include <vector>

#include "common/masks_sequence.h"
#include "common/masks_tensors.h"

namespace sslkernels {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

Tensor span_mask(const Tensor& seed, int64_t batch, int64_t length, const Optional& lengths, double ratio, int64_t span,
                 int64_t min_spans) {
  const Tensor out = empty_like(seed, {batch, length}, ScalarType::Bool);
  const Dense<int64_t> sizes(lengths, seed);
  run_samples(seed, batch, SpanMask{seed_of(seed), length, sizes, ratio, span, min_spans, flags_of(out)});
  return out;
}

Tensor centred_span_mask(const Tensor& seed, int64_t batch, int64_t length, const Optional& lengths, double ratio,
                         double density, int64_t span) {
  const Tensor out = empty_like(seed, {batch, length}, ScalarType::Bool);
  const Dense<int64_t> sizes(lengths, seed);
  run_samples(seed, batch, CentredSpanMask{seed_of(seed), length, sizes, ratio, density, span, flags_of(out)});
  return out;
}

Tensor word_span_mask(const Tensor& seed, int64_t batch, int64_t length, const Optional& lengths,
                      const Optional& word_ids, double ratio, std::vector<int64_t> thresholds) {
  const Tensor out = empty_like(seed, {batch, length}, ScalarType::Bool), reached = numbers(seed, thresholds);
  const Dense<int64_t> sizes(lengths, seed), ids(word_ids, seed);
  run_samples(seed, batch,
              WordSpanMask{seed_of(seed), length, sizes, ids, ratio, ids_of(reached),
                           static_cast<int64_t>(thresholds.size()), flags_of(out)});
  return out;
}

Pair token_mask(const Tensor& seed, const Tensor& tokens, const Optional& special, const Optional& word_ids,
                const Optional& lengths, int64_t mask_token, int64_t vocab_size, double ratio, int64_t max_predictions,
                double masked, double changed, int64_t ignore_index) {
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  const Tensor inputs = empty_like(seed, {batch, length}, ScalarType::Long),
               labels = empty_like(seed, {batch, length}, ScalarType::Long);
  const Dense<int64_t> given(tokens, seed), sizes(lengths, seed), ids(word_ids, seed);
  const Dense<uint8_t> never(special, seed);
  run_samples(seed, batch,
              TokenMask{seed_of(seed), length, given, ids, sizes, never, mask_token, vocab_size, ratio, max_predictions,
                        masked, changed, ignore_index, ids_of(inputs), ids_of(labels)});
  return {inputs, labels};
}

Pair span_corruption(const Tensor& seed, const Tensor& tokens, int64_t noise, int64_t spans, int64_t vocab_size,
                     std::optional<int64_t> eos) {
  const int64_t batch = tokens.size(0), length = tokens.size(1), extra = spans + eos.has_value();
  const Tensor inputs = empty_like(seed, {batch, length - noise + extra}, ScalarType::Long),
               targets = empty_like(seed, {batch, noise + extra}, ScalarType::Long);
  const Dense<int64_t> given(tokens, seed);
  run_samples(seed, batch,
              SpanCorruption{seed_of(seed), length, given, noise, spans, vocab_size, eos.has_value(), eos.value_or(0),
                             ids_of(inputs), ids_of(targets)});
  return {inputs, targets};
}

template <typename Library>
void register_sequence_masks(Library& library) {
  library.impl("span_mask", TORCH_BOX(&span_mask));
  library.impl("centred_span_mask", TORCH_BOX(&centred_span_mask));
  library.impl("word_span_mask", TORCH_BOX(&word_span_mask));
  library.impl("token_mask", TORCH_BOX(&token_mask));
  library.impl("span_corruption", TORCH_BOX(&span_corruption));
}

}  // namespace
}  // namespace sslkernels
