// SPDX-License-Identifier: Apache-2.0
// What the masks share: the words of a sample, random subsets, ids of what is in and out.
#pragma once

#include <array>

#include "common/philox.h"
#include "cpu/operand.h"

namespace sslkernels {

enum Tag : uint64_t { kRandom = 1, kBlock, kInverse, kMultiblock, kMultiblock3d, kSpan, kToken, kCorruption };

constexpr i64 kBatch = i64{1} << 47;  // the sample number of what a whole batch shares

// The first `blocks` blocks of four words of a region, where blocks is a multiple of 16.
void random_words(uint64_t seed, uint64_t stream, uint64_t region, i64 blocks, uint32_t* out);

// word(b, region, i) of sslkernels/reference/masks.py.
class Words {
 public:
  Words(const Tensor& seed, Tag tag, i64 sample)
      : seed_(*static_cast<const uint64_t*>(seed.const_data_ptr())), stream_((uint64_t{tag} << 48) + sample) {}

  // words 4 i to 4 i + 3
  std::array<uint32_t, 4> four(uint64_t region, i64 i) const {
    const Philox block = philox(seed_, stream_, (region << 32) + i);
    return {block.words[0], block.words[1], block.words[2], block.words[3]};
  }
  uint32_t at(uint64_t region, i64 i) const { return four(region, i / 4)[i % 4]; }

  // words 0 to count - 1; what is behind them in `out` is undefined
  const uint32_t* all(uint64_t region, i64 count, std::vector<uint32_t>& out) const {
    const i64 blocks = (count + 63) / 64 * 16;
    if (static_cast<i64>(out.size()) < 4 * blocks)
      out.resize(4 * blocks);
    random_words(seed_, stream_, region, blocks, out.data());
    return out.data();
  }

 private:
  uint64_t seed_, stream_;
};

// Uniform in [0, 1), a multiple of 2^-32.
inline double fraction(uint32_t word) { return word * 0x1p-32; }

// f(rows) on each thread's share of the rows
template <typename F>
void over_samples(i64 rows, double nanoseconds, const F& f) {
  constexpr double kFlopsANanosecond = 40;
  over_rows(rows, kFlopsANanosecond * nanoseconds * rows, f);
}

// Random subsets: those of the smallest keys, the earlier of two equal ones first.
class Subset {
 public:
  // key_i and i belong to the `count` smallest of n if code(key_i, i) is less than this.
  uint64_t cut(const uint32_t* keys, i64 n, i64 count);
  static uint64_t code(uint32_t key, i64 i) { return uint64_t{key} << 32 | static_cast<uint64_t>(i); }

  // Switches elements of `on` (n) on or off, those of the smallest keys staying on or going on, until `count` are.
  void adjust(uint8_t* on, i64 n, i64 count, const uint32_t* keys);

 private:
  std::vector<uint64_t> codes_;
  std::vector<uint32_t> chosen_;
};

// Ids of what is on and of what is off, both ascending; null: not wanted.
void write_ids(const uint8_t* on, i64 n, i64* ids, i64* others);

}  // namespace sslkernels
