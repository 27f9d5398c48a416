// SPDX-License-Identifier: Apache-2.0
// What the masks share on the CPU and on CUDA: the words of a sample, its scratch memory, random subsets.
//
// A sample is the work of a team: one thread of the CPU (cpu/masks.h) or one thread block (cuda/masks.h). All threads
// of a team run an algorithm together, each with the same values, and meet in the team's functions; what these write is
// seen by the whole team when they return:
//
//   each(n, f)                          f(i) for i < n, in any order and by any thread
//   each(rows, cols, f)                 f(row, col)
//   sum(n, f), sum(rows, cols, f)       of f, an integer
//   ranked(n, inside, f)                f(i, inside(i), how many before i are inside); returns how many are
//   find(n, inside, k)                  the k-th i that is inside, counted from 0
//   once(f)                             f(), an integer, by one thread
//   words(source, region, count, out)   out[i] = source.at(region, i) for i < count; `out` has room for padded(count)
//   cut(n, keys, member, members, count)
//                                       code(keys[i], i) is less than this for the `count` members of smallest code
//   sort(codes, n)                      ascending; there is room for power_of_two(n)
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"
#include "common/philox.h"

namespace sslkernels {

enum Tag : uint64_t { kRandom = 1, kBlock, kInverse, kMultiblock, kMultiblock3d, kSpan, kToken, kCorruption };

constexpr int64_t kBatch = int64_t{1} << 47;  // the sample number of what a whole batch shares

// word(b, region, i) of sslkernels/reference/masks.py.
class Words {
 public:
  SSLKERNELS_HOST_DEVICE Words(uint64_t seed, Tag tag, int64_t sample)
      : seed(seed), stream((uint64_t{tag} << 48) + static_cast<uint64_t>(sample)) {}

  // words 4 i to 4 i + 3
  SSLKERNELS_HOST_DEVICE Philox four(uint64_t region, int64_t i) const {
    return philox(seed, stream, (region << 32) + static_cast<uint64_t>(i));
  }
  SSLKERNELS_HOST_DEVICE uint32_t at(uint64_t region, int64_t i) const {
    const Philox block = four(region, i / 4);
    // an index that the compiler does not know would move the block from registers to memory
    const uint32_t even = i & 2 ? block.words[2] : block.words[0], odd = i & 2 ? block.words[3] : block.words[1];
    return i & 1 ? odd : even;
  }

  const uint64_t seed, stream;
};

// Uniform in [0, 1), a multiple of 2^-32.
SSLKERNELS_HOST_DEVICE inline double fraction(uint32_t word) { return word * 0x1p-32; }

// x + y z in two roundings, as the reference has it; the files of the CPU forbid contraction.
SSLKERNELS_HOST_DEVICE inline double add_product(double x, double y, double z) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(x, __dmul_rn(y, z));
#else
  return x + y * z;
#endif
}

template <typename T>
SSLKERNELS_HOST_DEVICE inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
SSLKERNELS_HOST_DEVICE inline T larger(T a, T b) {
  return a < b ? b : a;
}

// Numbers of words are rounded up to what the CPU writes at once.
SSLKERNELS_HOST_DEVICE inline int64_t padded(int64_t words) { return (words + 63) / 64 * 64; }

SSLKERNELS_HOST_DEVICE inline int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Hands out the scratch memory of a sample; from null on, it measures how much that is.
class Arena {
 public:
  SSLKERNELS_HOST_DEVICE explicit Arena(char* base) : base_(base) {}

  template <typename T>
  SSLKERNELS_HOST_DEVICE T* take(int64_t count) {
    const int64_t start = used_;
    used_ = (used_ + count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return base_ ? reinterpret_cast<T*>(base_ + start) : nullptr;
  }
  SSLKERNELS_HOST_DEVICE uint32_t* words(int64_t count) { return take<uint32_t>(padded(count)); }
  SSLKERNELS_HOST_DEVICE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Random subsets are those of the smallest keys, the earlier of two equal ones first: of the smallest codes.
SSLKERNELS_HOST_DEVICE inline uint64_t code(uint32_t key, int64_t i) {
  return uint64_t{key} << 32 | static_cast<uint64_t>(i);
}

struct Everyone {
  SSLKERNELS_HOST_DEVICE bool operator()(int64_t) const { return true; }
};

// Switches elements of `on` (n) on or off, those of the smallest keys staying on or going on, until `count` are.
template <typename Team>
SSLKERNELS_DEVICE void adjust(const Team& team, uint8_t* on, int64_t n, int64_t count, const uint32_t* keys) {
  const int64_t have = team.sum(n, [&](int64_t i) { return int64_t{on[i]}; });
  if (have == count)
    return;
  // too many: choose among them; too few: choose the rest among the others
  const uint8_t side = have > count;
  const uint64_t limit =
      team.cut(n, keys, [&](int64_t i) { return on[i] == side; }, side ? have : n - have, side ? count : count - have);
  team.each(n, [&](int64_t i) {
    if (on[i] == side)
      on[i] = code(keys[i], i) < limit;
  });
}

// Ids of what is on and of what is off, both ascending; null: not wanted.
template <typename Team>
SSLKERNELS_DEVICE void write_ids(const Team& team, const uint8_t* on, int64_t n, int64_t* ids, int64_t* others) {
  team.ranked(
      n, [&](int64_t i) { return on[i] != 0; },
      [&](int64_t i, bool inside, int64_t before) {
        if (inside && ids)
          ids[before] = i;
        else if (!inside && others)
          others[i - before] = i;
      });
}

}  // namespace sslkernels
