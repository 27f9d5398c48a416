// SPDX-License-Identifier: Apache-2.0
// One thread of the CPU as the team of a mask's samples; see common/masks.h.
#pragma once

#include <array>
#include <memory>
#include <utility>

#include "common/masks.h"
#include "cpu/operand.h"

// Where blocks are large is decided in floating point: no product and sum may be fused, on any processor.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace sslkernels {

// The first `blocks` blocks of four words of a region, where blocks is a multiple of 16.
void random_words(uint64_t seed, uint64_t stream, uint64_t region, i64 blocks, uint32_t* out);

class OneThread {
 public:
  template <typename F>
  void each(i64 n, const F& f) const {
    for (i64 i = 0; i < n; ++i) f(i);
  }

  template <typename F>
  void each(i64 rows, i64 cols, const F& f) const {
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) f(r, c);
  }

  template <typename F>
  i64 sum(i64 n, const F& f) const {
    i64 total = 0;
    for (i64 i = 0; i < n; ++i) total += f(i);
    return total;
  }

  template <typename F>
  i64 sum(i64 rows, i64 cols, const F& f) const {
    i64 total = 0;
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) total += f(r, c);
    return total;
  }

  template <typename Inside, typename F>
  i64 ranked(i64 n, const Inside& inside, const F& f) const {
    i64 before = 0;
    for (i64 i = 0; i < n; ++i) {
      const bool in = inside(i);
      f(i, in, before);
      before += in;
    }
    return before;
  }

  template <typename Inside>
  i64 find(i64 n, const Inside& inside, i64 k) const {
    i64 i = 0;
    for (; i < n; ++i) {
      k -= inside(i);
      if (k < 0)
        break;
    }
    return i;
  }

  template <typename F>
  auto once(const F& f) const {
    return f();
  }

  void words(const Words& source, uint64_t region, i64 count, uint32_t* out) const {
    random_words(source.seed, source.stream, region, padded(count) / 4, out);
  }

  template <typename Member>
  uint64_t cut(i64 n, const uint32_t* keys, const Member& member, i64 members, i64 count) const {
    if (count <= 0)
      return 0;
    if (count >= members)
      return ~uint64_t{0};
    // only one of 256 equal parts of the keys needs a closer look
    std::array<i64, 256> size{};
    for (i64 i = 0; i < n; ++i) size[keys[i] >> 24] += member(i);
    uint32_t part = 0;
    for (; count > size[part]; ++part) count -= size[part];
    codes_.resize(size[part] + 1);
    i64 found = 0;
    for (i64 i = 0; i < n; ++i) {
      codes_[found] = code(keys[i], i);
      found += keys[i] >> 24 == part && member(i);
      if (found == size[part])
        break;
    }
    std::nth_element(codes_.begin(), codes_.begin() + (count - 1), codes_.begin() + found);
    return codes_[count - 1] + 1;
  }

  void sort(uint64_t* codes, i64 n) const { std::sort(codes, codes + n); }

 private:
  mutable std::vector<uint64_t> codes_;
};

inline Tensor empty_like(const Tensor&, std::vector<i64> sizes, ScalarType dtype) {
  return empty(std::move(sizes), dtype);
}

// f(rows) on each thread's share of the rows
template <typename F>
void over_samples(i64 rows, double nanoseconds, const F& f) {
  constexpr double kFlopsANanosecond = 40;
  over_rows(rows, kFlopsANanosecond * nanoseconds * rows, f);
}

// sample(team, b, room) for each of a batch
template <typename Sample>
void run_samples(const Tensor&, i64 batch, const Sample& sample) {
  Arena measure(nullptr);
  sample.room(measure);
  over_samples(batch, sample.nanoseconds(), [&](Range rows) {
    const auto memory = std::make_unique<char[]>(measure.used());
    Arena arena(memory.get());
    const auto room = sample.room(arena);
    const OneThread team;
    for (i64 b = rows.begin; b < rows.end; ++b) sample(team, b, room);
  });
}

}  // namespace sslkernels
