// SPDX-License-Identifier: Apache-2.0
// ema_update_ for the CPU: a whole list of tensors of mixed dtypes in one parallel sweep.
#include "common/chunks.h"
#include "common/philox.h"
#include "common/rounding.h"
#include "cpu/operand.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sslkernels {
namespace {

// The random words of elements [first, ...) of tensor `stream`.
struct Random {
  uint64_t seed, stream;
  i64 first;
};

}  // namespace
}  // namespace sslkernels

// A product and a sum are rounded one by one, never fused: stochastic rounding has the same bits on every processor.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#define SSLKERNELS_LEAVES "cpu/ema.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {
namespace {

struct Pair {
  char* target;
  const char* source;
  i64 numel, bytes, first_chunk;
  bool copied;  // integers and bools
  Dtype to, from;
};

bool is_averaged(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

Pair pair_of(const Tensor& target, const Tensor& source, i64 first_chunk) {
  STD_TORCH_CHECK(target.numel() == source.numel(), "ema_update_: a source has another size than its target");
  const bool copied = !is_averaged(target);
  STD_TORCH_CHECK(copied ? target.scalar_type() == source.scalar_type() : is_averaged(source),
                  "ema_update_: a source has a dtype that does not go with its target's");
  return {static_cast<char*>(target.mutable_data_ptr()),
          static_cast<const char*>(source.const_data_ptr()),
          target.numel(),
          static_cast<i64>(target.element_size()),
          first_chunk,
          copied,
          copied ? Dtype::kByte : kind(target),
          copied ? Dtype::kByte : kind(source)};
}

// Elements [begin, end) of tensor number `index`
void update_part(const Pair& pair, i64 index, i64 begin, i64 end, double momentum, const uint64_t* seed) {
  if (pair.copied) {
    std::memmove(pair.target + begin * pair.bytes, pair.source + begin * pair.bytes, (end - begin) * pair.bytes);
    return;
  }
  const Random random{seed ? *seed : 0, static_cast<uint64_t>(index), begin};
  SSLKERNELS_AT_LEVEL(
      update(pair.target, pair.to, pair.source, pair.from, begin, end - begin, momentum, seed ? &random : nullptr));
}

void ema_update_(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                 const std::optional<Tensor>& momentum_tensor, double momentum,
                 const std::optional<Tensor>& seed_tensor) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "ema_update_: targets and sources differ in length");
  if (momentum_tensor) {
    momentum = momentum_tensor->scalar_type() == ScalarType::Double ? *data<double>(*momentum_tensor)
                                                                    : *data<float>(*momentum_tensor);
  }
  STD_TORCH_CHECK(momentum >= 0.0 && momentum <= 1.0, "ema_update_: momentum must be in [0, 1], got ", momentum);
  uint64_t seed = 0;
  if (seed_tensor)
    seed = *data<uint64_t>(*seed_tensor);
  std::vector<Pair> pairs;
  pairs.reserve(targets.size());
  i64 chunks = 0, numel = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    pairs.push_back(pair_of(targets[i], sources[i], chunks));
    chunks += blocks_for(pairs[i].numel);
    numel += pairs[i].numel;
  }
  constexpr double kCost = 40;  // flops that take as long as an element's way through memory
  const i64 threads = useful_threads(kCost * static_cast<double>(numel));
  run(threads, [&](i64 thread) {
    const i64 first = chunks * thread / threads, last = chunks * (thread + 1) / threads;
    for (size_t i = 0; i < pairs.size(); ++i) {
      const i64 begin = std::max<i64>(0, first - pairs[i].first_chunk) * kChunk;
      const i64 end = std::min(pairs[i].numel, (last - pairs[i].first_chunk) * kChunk);
      if (begin < end)
        update_part(pairs[i], static_cast<i64>(i), begin, end, momentum, seed_tensor ? &seed : nullptr);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) { library.impl("ema_update_", TORCH_BOX(&ema_update_)); }

}  // namespace sslkernels
