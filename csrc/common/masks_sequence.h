// SPDX-License-Identifier: Apache-2.0
// One sample of each mask of sequences; sslkernels/reference/_masks_sequence.py defines them, word for word. Structs
// are as in masks_grid.h.
#pragma once

#include <cmath>

#include "common/masks.h"

namespace sslkernels {

// How many leading tokens of a sample count; null lengths: all.
SSLKERNELS_HOST_DEVICE inline int64_t size_of(const int64_t* lengths, int64_t b, int64_t length) {
  return lengths ? smaller(larger(lengths[b], int64_t{0}), length) : length;
}

struct SpanMask {
  static constexpr int kThreads = 128;
  const uint64_t* seed;
  int64_t length;
  const int64_t* lengths;
  double ratio;
  int64_t span, min_spans;
  uint8_t* out;

  struct Room {
    uint8_t *mask, *begins;
    uint32_t* starts;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    const int64_t most = smaller(length, larger(static_cast<int64_t>(ratio * length / span + 1), min_spans));
    return {arena.take<uint8_t>(length), arena.take<uint8_t>(length), arena.words(most)};
  }
  double nanoseconds() const { return 100.0 + length; }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kSpan, b);
    const int64_t length = this->length, span = this->span;
    const int64_t size = size_of(lengths, b, length), places = larger(size - span + 1, int64_t{0});
    const int64_t drawn = static_cast<int64_t>(floor(ratio * size / span + fraction(words.at(1, 0))));
    const int64_t count = smaller(larger(drawn, min_spans), places);
    uint8_t *mask = room.mask, *begins = room.begins, *to = out + b * length;
    uint32_t* starts = room.starts;
    team.each(length, [&](int64_t i) { mask[i] = begins[i] = 0; });
    team.words(words, 0, count, starts);
    // Floyd's way to choose `count` of `places`
    team.once([&] {
      for (int64_t step = 0; step < count; ++step) {
        const uint32_t last = static_cast<uint32_t>(places - count + step), place = below(starts[step], last + 1ull);
        starts[step] = begins[place] ? last : place;
        begins[starts[step]] = 1;
      }
    });
    team.each(count, span, [&](int64_t s, int64_t i) { mask[starts[s] + i] = 1; });
    team.each(length, [&](int64_t i) { to[i] = mask[i]; });
  }
};

struct CentredSpanMask {
  static constexpr int kThreads = 128;
  const uint64_t* seed;
  int64_t length;
  const int64_t* lengths;
  double ratio, density;
  int64_t span;
  uint8_t* out;

  struct Room {
    uint8_t* mask;
    uint32_t *keys, *centres;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    return {arena.take<uint8_t>(length), arena.words(length), arena.words(static_cast<int64_t>(density * length))};
  }
  double nanoseconds() const { return 6.0 * length; }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kSpan, b);
    const int64_t length = this->length, span = this->span;
    const int64_t size = size_of(lengths, b, length), count = static_cast<int64_t>(floor(density * size));
    uint8_t *mask = room.mask, *to = out + b * length;
    team.words(words, 0, size, room.keys);
    team.words(words, 1, count, room.centres);
    team.each(length, [&](int64_t i) { mask[i] = 0; });
    team.each(count, [&](int64_t j) {
      const int64_t first = int64_t{below(room.centres[j], size)} - span / 2, end = smaller(first + span, size);
      for (int64_t i = larger(first, int64_t{0}); i < end; ++i) mask[i] = 1;
    });
    adjust(team, mask, size, static_cast<int64_t>(floor(ratio * size)), room.keys);
    team.each(length, [&](int64_t i) { to[i] = mask[i]; });
  }
};

struct WordSpanMask {
  static constexpr int kThreads = 128;
  const uint64_t* seed;
  int64_t length;
  const int64_t *lengths, *ids;  // ids: null where every token is a word
  double ratio;
  const int64_t* thresholds;
  int64_t longer;  // thresholds, that is how many words more than one a span may have
  uint8_t* out;

  struct Room {
    uint8_t* mask;
    int64_t* ordinal;  // the word of a token
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    return {arena.take<uint8_t>(length), arena.take<int64_t>(length)};
  }
  double nanoseconds() const { return 2000.0 + 10.0 * length; }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kSpan, b);
    const int64_t length = this->length;
    const int64_t size = size_of(lengths, b, length);
    const int64_t* id = ids ? ids + b * length : nullptr;
    uint8_t *mask = room.mask, *to = out + b * length;
    int64_t* ordinal = room.ordinal;
    const auto valid = [&](int64_t i) { return !id || id[i] >= 0; };
    team.each(length, [&](int64_t i) { mask[i] = 0; });
    team.ranked(
        size, [&](int64_t i) { return valid(i) && (!id || i == 0 || id[i] != id[i - 1]); },
        [&](int64_t i, bool begins, int64_t before) { ordinal[i] = before + begins; });
    int64_t free = size;
    if (id) {
      // a token that can't be masked ends every span, as if it were that many words
      free -= team.ranked(
          size, [&](int64_t i) { return !valid(i); },
          [&](int64_t i, bool barred, int64_t before) { ordinal[i] += (before + barred) * (longer + 1); });
    }
    int64_t remaining = static_cast<int64_t>(ceil(ratio * free));
    for (int64_t t = 0; remaining > 0; ++t) {
      const Philox word = words.four(2, t / 2);
      const uint32_t length_draw = t % 2 ? word.words[2] : word.words[0];
      const uint32_t place_draw = t % 2 ? word.words[3] : word.words[1];
      int64_t more = 0;
      for (int64_t i = 0; i < longer; ++i) more += length_draw >= thresholds[i];
      const int64_t anchor = team.find(size, [&](int64_t i) { return valid(i) && !mask[i]; }, below(place_draw, free));
      const int64_t taken = team.once([&] {
        const int64_t last_word = ordinal[anchor] + more;
        int64_t first = anchor, count = 0;
        while (first > 0 && ordinal[first - 1] == ordinal[anchor]) --first;
        for (int64_t i = first; i < size && ordinal[i] <= last_word && count < remaining; ++i) {
          if (!valid(i) || mask[i])
            continue;
          mask[i] = 1;
          ++count;
        }
        return count;
      });
      remaining -= taken;
      free -= taken;
    }
    team.each(length, [&](int64_t i) { to[i] = mask[i]; });
  }
};

struct TokenMask {
  static constexpr int kThreads = 128;
  const uint64_t* seed;
  int64_t length;
  const int64_t *tokens, *ids, *lengths;
  const uint8_t* special;
  int64_t mask_token, vocab_size;
  double ratio;
  int64_t max_predictions;
  double masked, changed;
  int64_t ignore_index;
  int64_t *inputs, *labels;

  struct Room {
    uint8_t *candidate, *chosen;
    uint32_t *keys, *draws;
    uint64_t* codes;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    return {arena.take<uint8_t>(length), arena.take<uint8_t>(length), arena.words(length),
            arena.words(2 * smaller(length, max_predictions)), arena.take<uint64_t>(ids ? power_of_two(length) : 0)};
  }
  double nanoseconds() const { return 8.0 * length; }

  // Words in random order, each taken if all of it fits into what is left of the budget.
  template <typename Team>
  SSLKERNELS_DEVICE void choose_words(const Team& team, const int64_t* id, int64_t budget, const Room& room) const {
    const int64_t length = this->length;
    const uint32_t* keys = room.keys;
    const uint8_t* candidate = room.candidate;
    uint8_t* chosen = room.chosen;
    uint64_t* codes = room.codes;
    const auto starts = [&](int64_t i) { return candidate[i] && (i == 0 || id[i] != id[i - 1] || !candidate[i - 1]); };
    team.each(length, [&](int64_t i) { chosen[i] = 0; });
    const int64_t count = team.ranked(length, starts, [&](int64_t i, bool inside, int64_t before) {
      if (inside)
        codes[before] = code(keys[i], i);
    });
    team.sort(codes, count);
    team.once([&] {
      int64_t left = budget;
      for (int64_t w = 0; w < count && left > 0; ++w) {
        const int64_t first = static_cast<int64_t>(codes[w] & 0xffffffff);
        int64_t end = first + 1;
        while (end < length && candidate[end] && !starts(end)) ++end;
        if (end - first > left)
          continue;
        for (int64_t i = first; i < end; ++i) chosen[i] = 1;
        left -= end - first;
      }
    });
  }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kToken, b);
    const int64_t length = this->length;
    const int64_t size = size_of(lengths, b, length);
    const int64_t *token = tokens + b * length, *id = ids ? ids + b * length : nullptr;
    const uint8_t* never = special ? special + b * length : nullptr;
    uint8_t *candidate = room.candidate, *chosen = room.chosen;
    const int64_t counted = team.sum(length, [&](int64_t i) {
      candidate[i] = chosen[i] = i < size && !(never && never[i]) && !(id && id[i] < 0);
      return int64_t{candidate[i]};
    });
    const int64_t part = static_cast<int64_t>(rint((lengths ? size : counted) * ratio));
    const int64_t budget = smaller(larger(part, int64_t{1}), max_predictions);
    team.words(words, 0, length, room.keys);
    team.words(words, 1, 2 * smaller(budget, counted), room.draws);
    if (id)
      choose_words(team, id, budget, room);
    else if (counted > budget)
      adjust(team, chosen, length, budget, room.keys);
    int64_t *input = inputs + b * length, *label = labels + b * length;
    team.ranked(
        length, [&](int64_t i) { return chosen[i] != 0; },
        [&](int64_t i, bool inside, int64_t before) {
          int64_t in = token[i], out = ignore_index;
          if (inside) {
            const double u = fraction(room.draws[2 * before]);
            out = in;
            in = u < masked ? mask_token : u < changed ? below(room.draws[2 * before + 1], vocab_size) : in;
          }
          input[i] = in;
          label[i] = out;
        });
  }
};

struct SpanCorruption {
  static constexpr int kThreads = 256;
  const uint64_t* seed;
  int64_t length;
  const int64_t* tokens;
  int64_t noise, spans, vocab_size;
  bool ends;
  int64_t eos;
  int64_t *inputs, *targets;

  // Of noise and of what is kept, one after the other: the keys, and where each segment begins among the items, their
  // number at last.
  struct Room {
    uint32_t *noise_keys, *kept_keys;
    int64_t *noise_begins, *kept_begins;
  };
  SSLKERNELS_HOST_DEVICE Room room(Arena& arena) const {
    return {arena.words(noise), arena.words(length - noise), arena.take<int64_t>(spans + 1),
            arena.take<int64_t>(spans + 1)};
  }
  double nanoseconds() const { return 8.0 * length; }

  // f(item, its segment, whether it is the first there)
  template <typename Team, typename F>
  SSLKERNELS_DEVICE static void over_items(const Team& team, const uint32_t* keys, int64_t items, uint64_t limit,
                                           const F& f) {
    team.ranked(
        items, [&](int64_t i) { return i == 0 || code(keys[i - 1], i - 1) < limit; },
        [&](int64_t i, bool first, int64_t before) { f(i, before + first - 1, first); });
  }

  // Where the segments of one side begin; returns the limit of the codes before which they do.
  template <typename Team>
  SSLKERNELS_DEVICE uint64_t cut_up(const Team& team, const Words& words, uint64_t side, int64_t items, uint32_t* keys,
                                    int64_t* begins) const {
    team.words(words, side, items - 1, keys);
    const uint64_t limit = team.cut(items - 1, keys, Everyone(), items - 1, spans - 1);
    over_items(team, keys, items, limit, [&](int64_t i, int64_t segment, bool first) {
      if (first)
        begins[segment] = i;
    });
    team.once([&] { begins[spans] = items; });
    return limit;
  }

  template <typename Team>
  SSLKERNELS_DEVICE void operator()(const Team& team, int64_t b, const Room& room) const {
    const Words words(*seed, kCorruption, b);
    const int64_t kept = length - noise, extra = spans + ends;
    const int64_t *token = tokens + b * length, *noise_begins = room.noise_begins, *kept_begins = room.kept_begins;
    int64_t *input = inputs + b * (kept + extra), *target = targets + b * (noise + extra);
    const uint64_t noise_limit = cut_up(team, words, 0, noise, room.noise_keys, room.noise_begins);
    const uint64_t kept_limit = cut_up(team, words, 1, kept, room.kept_keys, room.kept_begins);
    over_items(team, room.kept_keys, kept, kept_limit,
               [&](int64_t i, int64_t s, bool) { input[i + s] = token[i + noise_begins[s]]; });
    over_items(team, room.noise_keys, noise, noise_limit,
               [&](int64_t i, int64_t s, bool) { target[i + s + 1] = token[i + kept_begins[s + 1]]; });
    team.each(spans,
              [&](int64_t s) { input[kept_begins[s + 1] + s] = target[noise_begins[s] + s] = vocab_size - 1 - s; });
    if (ends)
      team.once([&] { input[kept + spans] = target[noise + spans] = eos; });
  }
};

}  // namespace sslkernels
