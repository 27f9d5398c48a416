// SPDX-License-Identifier: Apache-2.0
// One sample of each mask of a patch grid whose counts are known beforehand; sslkernels/reference/masks.py defines
// them, word for word. A struct is an op's arguments, `room` its scratch memory, kThreads a thread block that suits it,
// and nanoseconds() about what a sample costs a thread of the CPU.
#pragma once

#include <cmath>

#include "common/masks.h"

namespace sslkernels {

struct RandomMask {
  static constexpr int kThreads = 256;
  const uint64_t* seed;
  int64_t frames, places, keep;
  int64_t *visible, *masked;

  struct Room {
    uint32_t* keys;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const { return {arena.words(places)}; }
  double nanoseconds() const { return 4.0 * places + 2.0 * frames * places; }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const int64_t frames = this->frames, places = this->places, keep = this->keep;
    const uint32_t* keys = room.keys;
    team.words(Words(*seed, kRandom, b), 0, places, room.keys);
    const uint64_t limit = team.cut(places, keys, Everyone(), places, keep);
    int64_t *v = visible + b * frames * keep, *m = masked + b * frames * (places - keep);
    team.ranked(
        places, [&](int64_t i) { return code(keys[i], i) < limit; },
        [&](int64_t i, bool inside, int64_t before) {
          int64_t* out = inside ? v + before : m + (i - before);
          const int64_t step = inside ? keep : places - keep;
          for (int64_t t = 0; t < frames; ++t) out[t * step] = i + t * places;
        });
  }
};

// The place of each sample in a random order of the batch.
struct BatchOrder {
  static constexpr int kThreads = 1024;
  const uint64_t* seed;
  int64_t batch;
  int64_t* ranks;

  struct Room {
    uint32_t* keys;
    uint64_t* codes;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    return {arena.words(batch), arena.take<uint64_t>(power_of_two(batch))};
  }
  double nanoseconds() const { return 50.0 * batch; }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t, const Room& room) const {
    team.words(Words(*seed, kBlock, kBatch), 0, batch, room.keys);
    team.each(batch, [&](int64_t b) { room.codes[b] = code(room.keys[b], b); });
    team.sort(room.codes, batch);
    team.each(batch, [&](int64_t i) { ranks[room.codes[i] & 0xffffffff] = i; });
  }
};

struct BlockMask {
  static constexpr int kThreads = 32;  // draws follow one another, and few patches are looked at in each
  const uint64_t* seed;
  int64_t batch, height, width;
  double low, high, min_area, max_area, log_aspect_low, log_aspect_high;
  int64_t attempts;
  double probability;
  bool whole;
  const int64_t* ranks;  // of the samples; null: no slices
  uint8_t* out;

  struct Room {
    uint8_t* mask;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const { return {arena.take<uint8_t>(height * width)}; }
  double nanoseconds() const { return 2000.0 + 2.0 * height * width; }

  // How many patches the sample masks.
  SSLKERNELS_HOST_DEVICE double target(const Words& words, int64_t b) const {
    const Philox word = words.four(0, 0);
    double u = fraction(word.words[0]);
    if (ranks) {
      const int64_t count = static_cast<int64_t>(batch * probability);
      if (ranks[b] >= count)
        return 0;
      u = (ranks[b] + u) / count;
    } else if (!(fraction(word.words[1]) < probability)) {
      return 0;
    }
    const double size = static_cast<double>(height * width), part = add_product(low, high - low, u);
    return whole ? floor(add_product(1e-9, size, part)) : size * part;
  }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kBlock, b);
    const int64_t height = this->height, width = this->width;
    const int64_t size = height * width, draws = attempts * (20 + 2 * static_cast<int64_t>(size / max_area));
    const double wanted = target(words, b);
    uint8_t *mask = room.mask, *to = out + b * size;
    team.each(size, [&](int64_t i) { mask[i] = 0; });
    int64_t count = 0, fails = 0;
    for (int64_t t = 0; t < draws && count < wanted && fails < attempts; ++t, ++fails) {
      const Philox word = words.four(1, t);
      const double budget = smaller(wanted - count, max_area);
      const double area = add_product(min_area, budget - min_area, fraction(word.words[0]));
      // libraries differ in the last place of exp, which the rounding to whole patches hides but once in 10^14 draws
      const double aspect = exp(add_product(log_aspect_low, log_aspect_high - log_aspect_low, fraction(word.words[1])));
      const double rows_drawn = rint(sqrt(area * aspect)), cols_drawn = rint(sqrt(area / aspect));
      if (!(rows_drawn < height && cols_drawn < width))
        continue;
      const int64_t h = static_cast<int64_t>(rows_drawn), w = static_cast<int64_t>(cols_drawn);
      uint8_t* corner = mask + below(word.words[2], height - h + 1) * width + below(word.words[3], width - w + 1);
      const int64_t added =
          h * w - team.sum(h, w, [&](int64_t r, int64_t c) { return int64_t{corner[r * width + c]}; });
      if (added == 0 || added > budget)
        continue;
      team.each(h, w, [&](int64_t r, int64_t c) { corner[r * width + c] = 1; });
      count += added;
      fails = -1;
    }
    team.each(size, [&](int64_t i) { to[i] = mask[i]; });
  }
};

struct InverseBlockMask {
  static constexpr int kThreads = 256;
  const uint64_t* seed;
  int64_t height, width, blocks, block_size, keep;
  int64_t *visible, *masked;

  struct Room {
    uint32_t *keys, *centres;
    uint8_t* kept;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    return {arena.words(height * width), arena.words(blocks), arena.take<uint8_t>(height * width)};
  }
  double nanoseconds() const { return 6.0 * height * width; }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kInverse, b);
    const int64_t height = this->height, width = this->width, block_size = this->block_size, size = height * width;
    uint8_t* kept = room.kept;
    team.words(words, 0, size, room.keys);
    team.words(words, 1, blocks, room.centres);
    team.each(size, [&](int64_t i) { kept[i] = 0; });
    team.each(blocks, block_size, [&](int64_t i, int64_t r) {
      const uint32_t centre = below(room.centres[i], size);
      const int64_t row = centre / static_cast<uint32_t>(width) - block_size / 2 + r;
      const int64_t left = centre % static_cast<uint32_t>(width) - block_size / 2;
      if (row < 0 || row >= height)
        return;
      const int64_t end = smaller(left + block_size, width);
      for (int64_t c = larger(left, int64_t{0}); c < end; ++c) kept[row * width + c] = 1;
    });
    adjust(team, kept, size, keep, room.keys);
    write_ids(team, kept, size, visible + b * keep, masked + b * (size - keep));
  }
};

}  // namespace sslkernels
