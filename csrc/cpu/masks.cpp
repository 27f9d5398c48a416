// SPDX-License-Identifier: Apache-2.0
// Masks of patch grids with counts known beforehand; sslkernels/reference/masks.py defines them, word for word.
#include "cpu/masks.h"

#define SSLKERNELS_LEAVES "cpu/masks.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

void random_words(uint64_t seed, uint64_t stream, uint64_t region, i64 blocks, uint32_t* out) {
  SSLKERNELS_AT_LEVEL(words(seed, stream, static_cast<uint32_t>(region), blocks, out));
}

uint64_t Subset::cut(const uint32_t* keys, i64 n, i64 count) {
  if (count <= 0)
    return 0;
  if (count >= n)
    return ~uint64_t{0};
  // only one of 256 equal parts of the keys needs a closer look
  std::array<i64, 256> size{};
  for (i64 i = 0; i < n; ++i) ++size[keys[i] >> 24];
  uint32_t part = 0;
  for (; count > size[part]; ++part) count -= size[part];
  codes_.resize(size[part] + 1);
  i64 found = 0;
  for (i64 i = 0; i < n; ++i) {
    codes_[found] = code(keys[i], i);
    found += keys[i] >> 24 == part;
    if (found == size[part])
      break;
  }
  std::nth_element(codes_.begin(), codes_.begin() + (count - 1), codes_.begin() + found);
  return codes_[count - 1] + 1;
}

void Subset::adjust(uint8_t* on, i64 n, i64 count, const uint32_t* keys) {
  i64 have = 0;
  for (i64 i = 0; i < n; ++i) have += on[i];
  if (have == count)
    return;
  // too many: choose among them; too few: choose the rest among the others
  const uint8_t side = have > count;
  chosen_.resize(n + 1);
  i64 members = 0;
  for (i64 i = 0; i < n; ++i) {
    chosen_[members] = keys[i];
    members += on[i] == side;
  }
  const uint64_t limit = cut(chosen_.data(), members, side ? count : count - have);
  for (i64 i = 0, member = 0; i < n; ++i) {
    if (on[i] == side)
      on[i] = code(keys[i], member++) < limit;
  }
}

void write_ids(const uint8_t* on, i64 n, i64* ids, i64* others) {
  for (i64 i = 0; i < n; ++i) {
    if (on[i] && ids)
      *ids++ = i;
    else if (!on[i] && others)
      *others++ = i;
  }
}

namespace {

using Ids = std::tuple<Tensor, Tensor>;

Ids random_mask(const Tensor& seed, i64 batch, i64 frames, i64 places, i64 keep) {
  const i64 drop = places - keep;
  Tensor visible = empty({batch, frames * keep}, ScalarType::Long);
  Tensor masked = empty({batch, frames * drop}, ScalarType::Long);
  over_samples(batch, 4.0 * places + 2.0 * frames * places, [&](Range rows) {
    std::vector<uint32_t> keys;
    std::vector<i64> kept(places + 1), dropped(places + 1);
    Subset subset;
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const uint32_t* key = Words(seed, kRandom, b).all(0, places, keys);
      const uint64_t limit = subset.cut(key, places, keep);
      for (i64 i = 0, in = 0; i < places; ++i) {
        kept[in] = dropped[i - in] = i;
        in += Subset::code(key[i], i) < limit;
      }
      for (i64 t = 0; t < frames; ++t) {
        i64 *v = data<i64>(visible) + (b * frames + t) * keep, *m = data<i64>(masked) + (b * frames + t) * drop;
        for (i64 i = 0; i < keep; ++i) v[i] = kept[i] + t * places;
        for (i64 i = 0; i < drop; ++i) m[i] = dropped[i] + t * places;
      }
    }
  });
  return {visible, masked};
}

// How many patches each sample masks.
std::vector<double> block_targets(const Tensor& seed, i64 batch, i64 size, double low, double high, double probability,
                                  bool slices, bool whole) {
  std::vector<double> target(batch);
  std::vector<uint64_t> order(slices ? batch : 0);
  std::vector<uint32_t> keys;
  if (slices) {
    Words(seed, kBlock, kBatch).all(0, batch, keys);
    for (i64 b = 0; b < batch; ++b) order[b] = Subset::code(keys[b], b);
    std::sort(order.begin(), order.end());
  }
  const auto set = [&](i64 b, double u) {
    const double t = size * (low + (high - low) * u);
    target[b] = whole ? std::floor(t + 1e-9) : t;
  };
  const i64 count = static_cast<i64>(batch * probability);
  for (i64 i = 0; i < batch; ++i) {
    const i64 b = slices ? static_cast<i64>(order[i] & 0xffffffff) : i;
    const auto word = Words(seed, kBlock, b).four(0, 0);
    if (slices && i < count)
      set(b, (i + fraction(word[0])) / count);
    else if (!slices && fraction(word[1]) < probability)
      set(b, fraction(word[0]));
  }
  return target;
}

Tensor block_mask(const Tensor& seed, i64 batch, i64 height, i64 width, double low, double high, double min_area,
                  double max_area, double log_aspect_low, double log_aspect_high, i64 attempts, double probability,
                  bool slices, bool whole) {
  const i64 size = height * width, draws = attempts * (20 + 2 * static_cast<i64>(size / max_area));
  const auto targets = block_targets(seed, batch, size, low, high, probability, slices, whole);
  Tensor out = empty({batch, height, width}, ScalarType::Bool);
  over_samples(batch, 2000.0 + 2.0 * size, [&](Range rows) {
    for (i64 b = rows.begin; b < rows.end; ++b) {
      uint8_t* mask = data<uint8_t>(out) + b * size;
      std::memset(mask, 0, size);
      const Words words(seed, kBlock, b);
      i64 count = 0, fails = 0;
      for (i64 t = 0; t < draws && count < targets[b] && fails < attempts; ++t, ++fails) {
        const auto word = words.four(1, t);
        const double budget = std::min(targets[b] - count, max_area);
        const double area = min_area + (budget - min_area) * fraction(word[0]);
        const double aspect = std::exp(log_aspect_low + (log_aspect_high - log_aspect_low) * fraction(word[1]));
        const double rows_drawn = std::rint(std::sqrt(area * aspect)), cols_drawn = std::rint(std::sqrt(area / aspect));
        if (!(rows_drawn < height && cols_drawn < width))
          continue;
        const i64 h = static_cast<i64>(rows_drawn), w = static_cast<i64>(cols_drawn);
        uint8_t* corner = mask + below(word[2], height - h + 1) * width + below(word[3], width - w + 1);
        i64 added = h * w;
        for (i64 r = 0; r < h; ++r)
          for (i64 c = 0; c < w; ++c) added -= corner[r * width + c];
        if (added == 0 || added > budget)
          continue;
        for (i64 r = 0; r < h; ++r) std::memset(corner + r * width, 1, w);
        count += added;
        fails = -1;
      }
    }
  });
  return out;
}

Ids inverse_block_mask(const Tensor& seed, i64 batch, i64 height, i64 width, i64 blocks, i64 block_size, i64 keep) {
  const i64 size = height * width;
  Tensor visible = empty({batch, keep}, ScalarType::Long), masked = empty({batch, size - keep}, ScalarType::Long);
  over_samples(batch, 6.0 * size, [&](Range rows) {
    std::vector<uint32_t> keys, centres;
    std::vector<uint8_t> kept(size);
    Subset subset;
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(seed, kInverse, b);
      std::fill(kept.begin(), kept.end(), 0);
      words.all(1, blocks, centres);
      for (i64 i = 0; i < blocks; ++i) {
        const i64 centre = below(centres[i], size);
        const i64 top = centre / width - block_size / 2, left = centre % width - block_size / 2;
        const i64 from = std::max<i64>(left, 0), to = std::min(left + block_size, width);
        for (i64 r = std::max<i64>(top, 0); r < std::min(top + block_size, height); ++r)
          std::fill(&kept[r * width + from], &kept[r * width] + to, 1);
      }
      subset.adjust(kept.data(), size, keep, words.all(0, size, keys));
      write_ids(kept.data(), size, data<i64>(visible) + b * keep, data<i64>(masked) + b * (size - keep));
    }
  });
  return {visible, masked};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("random_mask", TORCH_BOX(&random_mask));
  library.impl("block_mask", TORCH_BOX(&block_mask));
  library.impl("inverse_block_mask", TORCH_BOX(&inverse_block_mask));
}

}  // namespace sslkernels
