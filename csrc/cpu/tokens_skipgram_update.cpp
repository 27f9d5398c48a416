// SPDX-License-Identifier: Apache-2.0
// skipgram_update_ for the CPU: word2vec's steps, pair after pair; their random choices are made ahead of them.
#include <cstdint>
#include <utility>
#include <vector>

#include "common/philox.h"
#include "cpu/operand.h"

namespace sslkernels {
namespace {

constexpr int kRows = 6;  // rows of the output table that a step visits together: five negatives and the centre word

// One context word's row against rows of the output table; a pair has more than one step where there are more rows, or
// where one comes twice: its second visit must see the first.
struct Step {
  int32_t input, row[kRows];
  int16_t rows;
  bool first, last;  // of the pair; the first step's first row is the centre word
};

}  // namespace
}  // namespace sslkernels

#define SSLKERNELS_LEAVES "cpu/tokens_skipgram_update.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {
namespace {

constexpr i64 kBlock = 512;  // centre words prepared at a time
constexpr i64 kLanes = 16;   // blocks of random words are made in multiples of this

// Blocks of Philox words, asked for one by one and made together.
class Requests {
 public:
  explicit Requests(uint64_t seed) : seed_(seed) {}
  void clear() {
    block_.clear();
    stream_.clear();
  }
  void add(uint32_t block, i64 stream) {
    block_.push_back(block);
    stream_.push_back(stream);
  }
  const uint32_t* make() {
    while (block_.size() % kLanes) add(0, 0);
    words_.resize(4 * block_.size());
    const i64 count = static_cast<i64>(block_.size());
    SSLKERNELS_AT_LEVEL(words(seed_, block_.data(), stream_.data(), count, words_.data()));
    return words_.data();
  }

 private:
  uint64_t seed_;
  std::vector<uint32_t> block_, words_;
  std::vector<i64> stream_;
};

// How pairs are drawn; the same for all threads.
struct Options {
  const i64 *offsets, *threshold, *alias;
  const float* keep;  // null: all words
  i64 vocabulary, window, negatives;
  uint64_t seed;

  int32_t draw(uint32_t word) const {
    const uint64_t product = static_cast<uint64_t>(word) * static_cast<uint64_t>(vocabulary);
    const i64 column = static_cast<i64>(product >> 32);
    return static_cast<int32_t>(static_cast<i64>(product & 0xffffffffu) < threshold[column] ? column : alias[column]);
  }
};

// The words of some sentences that are not dropped.
struct Text {
  struct Word {
    i64 position, first, last;  // in the whole text; its sentence within this list
    int32_t id, width;
  };
  std::vector<Word> words;

  template <typename Id>
  void read(const Id* tokens, Range sentences, const Options& options) {
    Requests requests(options.seed);
    for (i64 s = sentences.begin; s < sentences.end; ++s) {
      const i64 first = static_cast<i64>(words.size());
      for (i64 begin = options.offsets[s]; begin < options.offsets[s + 1]; begin += kBlock) {
        const i64 end = std::min(options.offsets[s + 1], begin + kBlock);
        requests.clear();
        for (i64 p = begin; p < end; ++p) requests.add(0, p);
        const uint32_t* random = requests.make();
        for (i64 p = begin; p < end; ++p, random += 4) {
          if (options.keep && !(uniform(random[0]) < options.keep[tokens[p]]))
            continue;
          const i64 width = options.window - below(random[1], static_cast<uint64_t>(options.window));
          words.push_back({p, first, 0, static_cast<int32_t>(tokens[p]), static_cast<int32_t>(width)});
        }
      }
      const i64 last = static_cast<i64>(words.size());
      for (i64 i = first; i < last; ++i) words[i].last = last;
    }
  }
  i64 size() const { return static_cast<i64>(words.size()); }
};

// The steps of some centre words, in order.
class Steps {
 public:
  explicit Steps(const Options& options) : options_(options), requests_(options.seed) {}

  void prepare(const Text& text, Range centres) {
    steps_.clear();
    requests_.clear();
    for (i64 i = centres.begin; i < centres.end; ++i) {
      const auto [low, high] = contexts(text.words[i], i);
      const i64 draws = (high - low - 1) * options_.negatives;
      for (i64 at = 0; at < draws; at += 4) requests_.add(static_cast<uint32_t>(1 + at / 4), text.words[i].position);
    }
    const uint32_t* random = requests_.make();
    for (i64 i = centres.begin; i < centres.end; ++i) {
      const auto [low, high] = contexts(text.words[i], i);
      const uint32_t* word = random;
      for (i64 j = low; j < high; ++j) {
        if (j == i)
          continue;
        add_pair(text.words[j].id, text.words[i].id, word);
        word += options_.negatives;
      }
      random += ((high - low - 1) * options_.negatives + 3) / 4 * 4;
    }
  }
  const Step* data() const { return steps_.data(); }
  i64 size() const { return static_cast<i64>(steps_.size()); }

 private:
  static std::pair<i64, i64> contexts(const Text::Word& word, i64 i) {
    return {std::max(word.first, i - word.width), std::min(word.last, i + word.width + 1)};
  }

  void add_pair(int32_t context, int32_t centre, const uint32_t* random) {
    Step step{context, {centre}, 1, true, false};
    for (i64 k = 0; k < options_.negatives; ++k) {
      const int32_t row = options_.draw(random[k]);
      if (row == centre)
        continue;
      bool full = step.rows == kRows;
      for (int n = 0; n < step.rows; ++n) full |= step.row[n] == row;
      if (full) {
        steps_.push_back(step);
        step.rows = 0;
        step.first = false;
      }
      step.row[step.rows++] = row;
    }
    step.last = true;
    steps_.push_back(step);
  }

  const Options& options_;
  Requests requests_;
  std::vector<Step> steps_;
};

template <typename T>
class Trainer {
 public:
  Trainer(const Tensor& input, const Tensor& output, double lr)
      : input_(data<T>(input)), output_(data<T>(output)), dim_(input.size(1)), lr_(static_cast<T>(lr)) {}

  i64 dim() const { return dim_; }
  void train(const Steps& steps, T* step) const {
    SSLKERNELS_AT_LEVEL(train(input_, output_, dim_, steps.data(), steps.size(), lr_, step));
  }

 private:
  T *input_, *output_;
  i64 dim_;
  T lr_;
};

// The sentences of thread t of `count`: those that begin in its share of the text.
Range sentences_of(const i64* offsets, i64 sentences, i64 t, i64 count) {
  const i64 tokens = offsets[sentences];
  const auto from = [&](i64 part) {
    return part == count ? sentences : std::lower_bound(offsets, offsets + sentences, tokens / count * part) - offsets;
  };
  return {t == 0 ? 0 : from(t), from(t + 1)};
}

template <typename T, typename Id>
void update(const Trainer<T>& trainer, const Id* tokens, i64 sentences, const Options& options, bool hogwild) {
  const double pairs = static_cast<double>(options.offsets[sentences]) * options.window;
  const i64 threads = useful_threads(pairs * 6.0 * (1 + options.negatives) * trainer.dim());
  std::vector<Text> texts(threads);
  run(threads, [&](i64 t) {
    texts[t].read(tokens, sentences_of(options.offsets, sentences, t, threads), options);
    if (!hogwild)
      return;
    Steps steps(options);
    Buffer<T> step(trainer.dim());
    for (i64 begin = 0; begin < texts[t].size(); begin += kBlock) {
      steps.prepare(texts[t], {begin, std::min(texts[t].size(), begin + kBlock)});
      trainer.train(steps, step);
    }
  });
  if (hogwild)
    return;
  std::vector<std::pair<i64, Range>> blocks;
  for (i64 t = 0; t < threads; ++t)
    for (i64 begin = 0; begin < texts[t].size(); begin += kBlock)
      blocks.push_back({t, {begin, std::min(texts[t].size(), begin + kBlock)}});
  Steps steps[2] = {Steps(options), Steps(options)};
  Buffer<T> step(trainer.dim());
  const i64 count = static_cast<i64>(blocks.size());
  for (i64 b = -1; b < count; ++b) {  // one thread trains on a block while another prepares the next
    run(b >= 0 && b + 1 < count && threads > 1 ? 2 : 1, [&](i64 t) {
      const bool alone = !(b >= 0 && b + 1 < count && threads > 1);
      if (b >= 0 && (t == 0 || alone))
        trainer.train(steps[b & 1], step);
      if (b + 1 < count && (t == 1 || alone))
        steps[(b + 1) & 1].prepare(texts[blocks[b + 1].first], blocks[b + 1].second);
    });
  }
}

const i64* checked(const Tensor& x, i64 low, i64 high, const char* name) {
  const i64* values = data<i64>(x);
  for (i64 i = 0; i < x.numel(); ++i)
    STD_TORCH_CHECK(values[i] >= low && values[i] <= high, "skipgram_update_: ", name, " must be in [", low, ", ", high,
                    "], got ", values[i]);
  return values;
}

void skipgram_update_(const Tensor& input, const Tensor& output, const Tensor& tokens_, const Tensor& offsets_,
                      const Tensor& threshold_, const Tensor& alias_, const Optional& keep_, const Tensor& seed,
                      double lr, i64 window, i64 negatives, bool hogwild) {
  const i64 vocabulary = input.size(0), sentences = offsets_.size(0) - 1;
  STD_TORCH_CHECK(input.scalar_type() == output.scalar_type() && input.is_contiguous() && output.is_contiguous() &&
                      output.size(0) == vocabulary && output.size(1) == input.size(1),
                  "skipgram_update_: both tables must be contiguous, of one shape and dtype");
  STD_TORCH_CHECK(vocabulary < (i64{1} << 31), "skipgram_update_: more words than 2^31");
  const Tensor tokens = torch::stable::contiguous(tokens_), offsets = torch::stable::contiguous(offsets_);
  const Tensor threshold = torch::stable::contiguous(threshold_), alias = torch::stable::contiguous(alias_);
  Optional keep;
  if (keep_)
    keep = torch::stable::contiguous(*keep_);
  const Options options{checked(offsets, 0, tokens.numel(), "offsets"),
                        data<i64>(threshold),
                        checked(alias, 0, vocabulary - 1, "table.alias"),
                        keep ? data<float>(*keep) : nullptr,
                        vocabulary,
                        window,
                        negatives,
                        *data<uint64_t>(seed)};
  STD_TORCH_CHECK(options.offsets[0] == 0 && options.offsets[sentences] == tokens.numel(),
                  "skipgram_update_: offsets must go from 0 to the number of tokens");
  for (i64 s = 0; s < sentences; ++s)
    STD_TORCH_CHECK(options.offsets[s] <= options.offsets[s + 1], "skipgram_update_: offsets must rise");
  with_type(is_double(input), [&](auto zero) {
    using T = decltype(zero);
    const Trainer<T> trainer(input, output, lr);
    if (tokens.scalar_type() == ScalarType::Long)
      return update(trainer, checked(tokens, 0, vocabulary - 1, "tokens"), sentences, options, hogwild);
    const int32_t* ids = data<int32_t>(tokens);
    for (i64 i = 0; i < tokens.numel(); ++i)
      STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < vocabulary, "skipgram_update_: tokens must be in [0, ", vocabulary,
                      "), got ", ids[i]);
    update(trainer, ids, sentences, options, hogwild);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) { library.impl("skipgram_update_", TORCH_BOX(&skipgram_update_)); }

}  // namespace sslkernels
