// SPDX-License-Identifier: Apache-2.0
// Masks of latent prediction: one block size a batch, positions a sample, all cut to one length.
#include "cpu/masks.h"

#include "common/masks_tensors.h"

namespace sslkernels {

namespace {

using Ids = std::tuple<Tensor, Tensor>;
using Ends = std::vector<double>;  // smallest and largest

constexpr i64 kContextAttempts = 20;  // before one target block is allowed to overlap
constexpr i64 kClipAttempts = 100;    // to find blocks that leave a context

struct Sides {
  i64 h, w;
};

double mix(const Ends& ends, double u) { return ends[0] + u * (ends[1] - ends[0]); }

// Of a block within the grid, and never empty.
Sides block_sides(double area, double aspect, i64 height, i64 width) {
  const i64 h = static_cast<i64>(std::rint(std::sqrt(area * aspect)));
  const i64 w = static_cast<i64>(std::rint(std::sqrt(area / aspect)));
  return {std::max<i64>(std::min(h, height), 1), std::max<i64>(std::min(w, width), 1)};
}

// Cuts each sample's members (rows of n flags) to `count`, random ones or the first, and returns their ids.
Tensor survivors(const Tensor& seed, Tag tag, uint64_t region, std::vector<uint8_t>& members, i64 batch, i64 n,
                 i64 count, bool raster) {
  Tensor out = empty({batch, count}, ScalarType::Long);
  over_samples(batch, 6.0 * n, [&](Range rows) {
    std::vector<uint32_t> keys(padded(n));  // all alike in raster order
    const OneThread team;
    for (i64 b = rows.begin; b < rows.end; ++b) {
      uint8_t* on = &members[b * n];
      if (!raster)
        team.words(Words(*seed_of(seed), tag, b), region, n, keys.data());
      adjust(team, on, n, count, keys.data());
      write_ids(team, on, n, data<i64>(out) + b * count, nullptr);
    }
  });
  return out;
}

i64 count_of(const uint8_t* on, i64 n) {
  i64 count = 0;
  for (i64 i = 0; i < n; ++i) count += on[i];
  return count;
}

i64 smallest(const std::vector<i64>& counts) {
  return counts.empty() ? 0 : *std::min_element(counts.begin(), counts.end());
}

Ids multiblock_mask(const Tensor& seed, i64 batch, i64 height, i64 width, i64 targets, Ends context_scale,
                    Ends target_scale, Ends target_aspect, i64 min_keep, bool allow_overlap, bool raster,
                    bool reproduce_bugs, std::optional<i64> context_tokens) {
  const i64 size = height * width;
  const Philox shared = Words(*seed_of(seed), kMultiblock, kBatch).four(0, 0);
  const double u[3] = {fraction(shared.words[0]), fraction(shared.words[1]), fraction(shared.words[2])};
  const auto sides = [&](double scale, double aspect) {  // smaller than the grid in each direction
    return block_sides(std::floor(size * scale), aspect, height - 1, width - 1);
  };
  const Sides target = sides(mix(target_scale, u[0]), mix(target_aspect, reproduce_bugs ? u[0] : u[1]));
  const Sides context = sides(mix(context_scale, u[2]), 1.0);
  const auto corner = [&](Sides block, uint32_t row, uint32_t col) {
    const i64 inside = reproduce_bugs ? 0 : 1;
    return below(row, std::max<i64>(height - block.h + inside, 1)) * width +
           below(col, std::max<i64>(width - block.w + inside, 1));
  };

  Tensor out = empty({batch, targets, target.h * target.w}, ScalarType::Long);
  std::vector<uint8_t> members(batch * size);
  std::vector<i64> counts(batch);
  over_samples(batch, 1000.0 + 10.0 * size, [&](Range rows) {
    std::vector<i64> covered(size);  // by which target block first
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(*seed_of(seed), kMultiblock, b);
      std::fill(covered.begin(), covered.end(), targets);
      i64* id = data<i64>(out) + b * targets * target.h * target.w;
      for (i64 k = 0; k < targets; ++k) {
        const i64 at = corner(target, words.at(1, 2 * k), words.at(1, 2 * k + 1));
        for (i64 r = 0; r < target.h; ++r) {
          for (i64 i = at + r * width; i < at + r * width + target.w; ++i) {
            *id++ = i;
            covered[i] = std::min(covered[i], k);
          }
        }
      }
      uint8_t* member = &members[b * size];
      i64 avoided = allow_overlap ? 0 : targets;  // the last target block is given up first
      for (i64 attempt = 0; avoided >= 0; avoided -= ++attempt % kContextAttempts == 0) {
        const i64 at = corner(context, words.at(2, 2 * attempt), words.at(2, 2 * attempt + 1));
        std::memset(member, 0, size);
        i64 count = 0;
        for (i64 r = 0; r < context.h; ++r)
          for (i64 i = at + r * width; i < at + r * width + context.w; ++i) count += member[i] = covered[i] >= avoided;
        counts[b] = count;
        if (count > min_keep)
          break;
      }
    }
  });
  const i64 shortest = smallest(counts), count = context_tokens.value_or(shortest);
  STD_TORCH_CHECK(!batch || shortest >= count, "context_tokens must be at most the ", shortest, " of this batch, got ",
                  count);
  return {survivors(seed, kMultiblock, 0, members, batch, size, count, raster), out};
}

Ids multiblock3d_mask(const Tensor& seed, i64 batch, i64 frames, i64 height, i64 width, i64 blocks, Ends spatial_scale,
                      Ends temporal_scale, Ends aspect, bool raster, i64 context_frames, std::optional<i64> max_keep) {
  const i64 place = height * width, size = frames * place;
  const Philox shared = Words(*seed_of(seed), kMultiblock3d, kBatch).four(0, 0);
  const i64 t = std::max<i64>(1, static_cast<i64>(frames * mix(temporal_scale, fraction(shared.words[0]))));
  const double area = std::floor(place * mix(spatial_scale, fraction(shared.words[1])));
  const Sides block = block_sides(area, mix(aspect, fraction(shared.words[2])), height, width);

  std::vector<uint8_t> context(batch * size);
  std::vector<i64> counts(batch);
  over_samples(batch, 100.0 * blocks + 4.0 * size, [&](Range rows) {
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(*seed_of(seed), kMultiblock3d, b);
      uint8_t* visible = &context[b * size];
      for (i64 attempt = 0; attempt < kClipAttempts && !counts[b]; ++attempt) {
        std::memset(visible, 1, context_frames * place);
        for (i64 k = 0; k < blocks; ++k) {
          const Philox word = words.four(2, attempt * blocks + k);
          const i64 top = below(word.words[0], height - block.h + 1), left = below(word.words[1], width - block.w + 1);
          const i64 start = below(word.words[2], frames - t + 1);
          for (i64 f = start; f < start + t; ++f)
            for (i64 r = top; r < top + block.h; ++r) std::memset(visible + f * place + r * width + left, 0, block.w);
        }
        counts[b] = count_of(visible, size);
      }
    }
  });
  i64 kept = smallest(counts), lost = counts.empty() ? 0 : size - *std::max_element(counts.begin(), counts.end());
  STD_TORCH_CHECK(!batch || kept, "blocks must leave a context, got ", blocks, " of ", t, " x ", block.h, " x ",
                  block.w, " that cover the clip");
  std::vector<uint8_t> target(context.size());
  for (size_t i = 0; i < context.size(); ++i) target[i] = !context[i];
  kept = std::min(kept, max_keep.value_or(kept));
  Tensor ids = survivors(seed, kMultiblock3d, 0, context, batch, size, kept, raster);
  return {ids, survivors(seed, kMultiblock3d, 1, target, batch, size, lost, raster)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("multiblock_mask", TORCH_BOX(&multiblock_mask));
  library.impl("multiblock3d_mask", TORCH_BOX(&multiblock3d_mask));
}

}  // namespace sslkernels
