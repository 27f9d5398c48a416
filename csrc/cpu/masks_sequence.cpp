// SPDX-License-Identifier: Apache-2.0
// Masks of sequences; sslkernels/reference/_masks_sequence.py defines them, word for word.
#include "cpu/masks.h"

namespace sslkernels {

namespace {

using Pair = std::tuple<Tensor, Tensor>;

// Rows of an optional tensor; null where it is not given.
template <typename T>
class Rows {
 public:
  explicit Rows(const Optional& x) {
    if (x) {
      tensor_ = torch::stable::contiguous(*x);
      data_ = static_cast<const T*>(tensor_->const_data_ptr());
      length_ = x->dim() == 2 ? x->size(1) : 1;
    }
  }
  explicit operator bool() const { return data_; }
  const T* operator[](i64 b) const { return data_ ? data_ + b * length_ : nullptr; }

 private:
  Optional tensor_;
  const T* data_ = nullptr;
  i64 length_ = 0;
};

// How many leading tokens of a sample count.
i64 size_of(const Rows<i64>& lengths, i64 b, i64 length) {
  return lengths ? std::clamp<i64>(*lengths[b], 0, length) : length;
}

Tensor span_mask(const Tensor& seed, i64 batch, i64 length, const Optional& lengths, double ratio, i64 span,
                 i64 min_spans) {
  Tensor out = empty({batch, length}, ScalarType::Bool);
  const Rows<i64> sizes(lengths);
  over_samples(batch, 100.0 + length, [&](Range rows) {
    std::vector<uint32_t> draws;
    std::vector<uint8_t> begins(length);
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(seed, kSpan, b);
      uint8_t* mask = data<uint8_t>(out) + b * length;
      std::memset(mask, 0, length);
      std::fill(begins.begin(), begins.end(), 0);
      const i64 size = size_of(sizes, b, length), starts = std::max<i64>(size - span + 1, 0);
      const i64 drawn = static_cast<i64>(std::floor(ratio * size / span + fraction(words.at(1, 0))));
      const i64 count = std::min(std::max(drawn, min_spans), starts);
      words.all(0, count, draws);
      // Floyd's way to choose `count` of `starts`
      for (i64 step = 0; step < count; ++step) {
        const i64 last = starts - count + step, place = below(draws[step], last + 1),
                  start = begins[place] ? last : place;
        begins[start] = 1;
        std::memset(mask + start, 1, span);
      }
    }
  });
  return out;
}

Tensor centred_span_mask(const Tensor& seed, i64 batch, i64 length, const Optional& lengths, double ratio,
                         double density, i64 span) {
  Tensor out = empty({batch, length}, ScalarType::Bool);
  const Rows<i64> sizes(lengths);
  over_samples(batch, 6.0 * length, [&](Range rows) {
    std::vector<uint32_t> keys, centres;
    Subset subset;
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(seed, kSpan, b);
      uint8_t* mask = data<uint8_t>(out) + b * length;
      std::memset(mask, 0, length);
      const i64 size = size_of(sizes, b, length), count = static_cast<i64>(std::floor(density * size));
      words.all(1, count, centres);
      for (i64 j = 0; j < count; ++j) {
        const i64 first = i64{below(centres[j], size)} - span / 2, from = std::max<i64>(first, 0);
        std::memset(mask + from, 1, std::min(first + span, size) - from);
      }
      subset.adjust(mask, size, static_cast<i64>(std::floor(ratio * size)), words.all(0, size, keys));
    }
  });
  return out;
}

Tensor word_span_mask(const Tensor& seed, i64 batch, i64 length, const Optional& lengths, const Optional& word_ids,
                      double ratio, std::vector<i64> thresholds) {
  Tensor out = empty({batch, length}, ScalarType::Bool);
  const Rows<i64> sizes(lengths), ids(word_ids);
  over_samples(batch, 2000.0 + 10.0 * length, [&](Range rows) {
    std::vector<i64> ordinal(length), open(length);  // the word of a token; the tokens that may be an anchor
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(seed, kSpan, b);
      const i64 size = size_of(sizes, b, length);
      const i64* id = ids[b];
      uint8_t* mask = data<uint8_t>(out) + b * length;
      std::memset(mask, 0, length);
      const auto valid = [&](i64 i) { return !id || id[i] >= 0; };
      i64 count = 0;
      for (i64 i = 0, word = 0; i < size; ++i) {
        // a token that can't be masked ends every span, as if it were that many words
        if (!valid(i))
          word += thresholds.size() + 1;
        else if (!id || i == 0 || id[i] != id[i - 1])
          ++word;
        ordinal[i] = word;
        count += valid(i);
      }
      i64 remaining = static_cast<i64>(std::ceil(ratio * count));
      for (i64 t = 0; remaining > 0; ++t) {
        const uint32_t draw = words.at(2, 2 * t);
        i64 free = 0, more = 0;
        for (i64 i = 0; i < size; ++i) {
          open[free] = i;
          free += valid(i) && !mask[i];
        }
        for (const i64 threshold : thresholds) more += draw >= threshold;
        i64 first = open[below(words.at(2, 2 * t + 1), free)];
        const i64 last_word = ordinal[first] + more;
        while (first > 0 && ordinal[first - 1] == ordinal[first]) --first;
        for (i64 i = first; i < size && ordinal[i] <= last_word && remaining > 0; ++i) {
          if (!valid(i) || mask[i])
            continue;
          mask[i] = 1;
          --remaining;
        }
      }
    }
  });
  return out;
}

// Words in random order, each taken if all of it fits into what is left of the budget.
void choose_words(const uint32_t* keys, const uint8_t* candidate, const i64* word, i64 n, i64 budget, uint8_t* chosen,
                  std::vector<uint64_t>& order) {
  order.clear();
  const auto starts = [&](i64 i) { return candidate[i] && (i == 0 || word[i] != word[i - 1] || !candidate[i - 1]); };
  for (i64 i = 0; i < n; ++i)
    if (starts(i))
      order.push_back(Subset::code(keys[i], i));
  std::sort(order.begin(), order.end());
  for (const uint64_t code : order) {
    const i64 first = static_cast<i64>(code & 0xffffffff);
    i64 end = first + 1;
    while (end < n && candidate[end] && !starts(end)) ++end;
    if (end - first > budget)
      continue;
    std::memset(chosen + first, 1, end - first);
    budget -= end - first;
  }
}

Pair token_mask(const Tensor& seed, const Tensor& tokens_tensor, const Optional& special, const Optional& word_ids,
                const Optional& lengths, i64 mask_token, i64 vocab_size, double ratio, i64 max_predictions,
                double masked, double changed, i64 ignore_index) {
  const Tensor tokens = torch::stable::contiguous(tokens_tensor);
  const i64 batch = tokens.size(0), length = tokens.size(1);
  Tensor inputs = empty({batch, length}, ScalarType::Long), labels = empty({batch, length}, ScalarType::Long);
  const Rows<i64> sizes(lengths), ids(word_ids);
  const Rows<uint8_t> specials(special);
  over_samples(batch, 8.0 * length, [&](Range rows) {
    std::vector<uint32_t> keys, draws;
    std::vector<uint8_t> candidate(length), chosen(length);
    std::vector<uint64_t> order;
    Subset subset;
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(seed, kToken, b);
      const i64 size = size_of(sizes, b, length);
      const uint8_t* never = specials[b];
      const i64* word = ids[b];
      i64 counted = 0;
      for (i64 i = 0; i < length; ++i) {
        candidate[i] = i < size && !(never && never[i]) && !(word && word[i] < 0);
        counted += candidate[i];
      }
      const double part = std::rint((lengths ? size : counted) * ratio);
      const i64 budget = std::min(std::max<i64>(static_cast<i64>(part), 1), max_predictions);
      words.all(0, length, keys);
      if (word) {
        std::fill(chosen.begin(), chosen.end(), 0);
        choose_words(keys.data(), candidate.data(), word, length, budget, chosen.data(), order);
      } else {
        chosen = candidate;
        if (counted > budget)
          subset.adjust(chosen.data(), length, budget, keys.data());
      }
      const i64* token = static_cast<const i64*>(tokens.const_data_ptr()) + b * length;
      i64 *input = data<i64>(inputs) + b * length, *label = data<i64>(labels) + b * length;
      const uint32_t* draw = words.all(1, 2 * std::min(budget, counted), draws);
      for (i64 i = 0; i < length; ++i) {
        input[i] = token[i];
        label[i] = ignore_index;
        if (!chosen[i])
          continue;
        const double u = fraction(draw[0]);
        label[i] = token[i];
        input[i] = u < masked ? mask_token : u < changed ? below(draw[1], vocab_size) : token[i];
        draw += 2;
      }
    }
  });
  return {inputs, labels};
}

Pair span_corruption(const Tensor& seed, const Tensor& tokens_tensor, i64 noise, i64 spans, i64 vocab_size,
                     std::optional<i64> eos) {
  const Tensor tokens = torch::stable::contiguous(tokens_tensor);
  const i64 batch = tokens.size(0), length = tokens.size(1), kept = length - noise, extra = spans + eos.has_value();
  Tensor inputs = empty({batch, kept + extra}, ScalarType::Long);
  Tensor targets = empty({batch, noise + extra}, ScalarType::Long);
  over_samples(batch, 8.0 * length, [&](Range rows) {
    std::vector<uint32_t> keys[2];
    Subset subset;
    for (i64 b = rows.begin; b < rows.end; ++b) {
      const Words words(seed, kCorruption, b);
      const i64 items[2] = {noise, kept};
      uint64_t limit[2];
      for (int side = 0; side < 2; ++side) {
        words.all(side, items[side] - 1, keys[side]);
        limit[side] = subset.cut(keys[side].data(), items[side] - 1, spans - 1);
      }
      const i64* token = static_cast<const i64*>(tokens.const_data_ptr()) + b * length;
      i64 *input = data<i64>(inputs) + b * (kept + extra), *target = data<i64>(targets) + b * (noise + extra);
      // a segment goes on until an item that begins the next one, or the last item
      const auto copy = [&](int side, i64& item, i64*& to) {
        do {
          *to++ = *token++;
          ++item;
        } while (item < items[side] && Subset::code(keys[side][item - 1], item - 1) >= limit[side]);
      };
      i64 done[2] = {0, 0};
      for (i64 s = 0; s < spans; ++s) {
        copy(1, done[1], input);
        *input++ = *target++ = vocab_size - 1 - s;
        copy(0, done[0], target);
      }
      if (eos)
        *input = *target = *eos;
    }
  });
  return {inputs, targets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("span_mask", TORCH_BOX(&span_mask));
  library.impl("centred_span_mask", TORCH_BOX(&centred_span_mask));
  library.impl("word_span_mask", TORCH_BOX(&word_span_mask));
  library.impl("token_mask", TORCH_BOX(&token_mask));
  library.impl("span_corruption", TORCH_BOX(&span_corruption));
}

}  // namespace sslkernels
