// SPDX-License-Identifier: Apache-2.0
// Cross-entropy of the logits of a linear layer with hard targets.
//
// Rows that count meet the layer strip by strip; a tile of logits never leaves the cache before its maxima, its
// exponentials against the largest logit so far, and their product with the strip, which is the gradient of the rows
// but for a factor, are known. The gradient of the layer needs each row's log-sum-exp, so it takes a second sweep over
// the exponentials. These are kept: for as many rows as the layer has features in the memory of that gradient itself,
// as a strip of exponentials is overwritten only by its own strip of the gradient; for more rows in a panel, or they
// are computed again.
//
// The target's logit is kept out of all sums: a loss is softplus(log-sum-exp of the others - target), and the slope at
// the target minus the sum of the others', neither of which cancels where the model is sure.
#include "cpu/linear_panel.h"

#define SSLKERNELS_LEAVES "cpu/tokens_linear.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

// The layer and the rows that count, with their targets.
template <typename T>
struct Head {
  Head(const Tensor& input, const Tensor& weight, const Optional& bias, const Tensor& target, i64 ignore_index,
       double smoothing, double z)
      : input(input),
        weight(weight),
        total(input.size(0)),
        width(weight.size(0)),
        depth(weight.size(1)),
        smoothing(smoothing),
        z(z) {
    if (bias) {
      dense_bias = torch::stable::contiguous(torch::stable::to(*bias, kScalar<T>));
      this->bias = data<T>(*dense_bias);
    }
    const Tensor dense_target = torch::stable::contiguous(target);
    const i64* classes = static_cast<const i64*>(dense_target.const_data_ptr());
    for (i64 i = 0; i < total; ++i) {
      if (classes[i] == ignore_index)
        continue;
      STD_TORCH_CHECK(classes[i] >= 0 && classes[i] < width, "linear_cross_entropy: target must be in [0, ", width,
                      ") or ", ignore_index, ", got ", classes[i]);
      rows.push_back(i);
      targets.push_back(classes[i]);
    }
  }

  i64 count() const { return static_cast<i64>(rows.size()); }

  const Operand<T> input, weight;
  const i64 total, width, depth;
  const double smoothing, z;
  Optional dense_bias;
  const T* bias = nullptr;
  std::vector<i64> rows, targets;
};

// Where gradients go, null where nobody wants one: dense. Rows that do not count are not written.
template <typename T>
struct Gradients {
  T *input, *weight, *bias;
  bool any() const { return input || weight || bias; }
  bool of_layer() const { return weight || bias; }
};

// What is known of a row when all of the layer has been met.
struct Found {
  double loss, lse, doubt;  // doubt: the probability of all classes but the target's
};

// Where the exponentials of some rows wait for the second sweep.
enum class Keep { kInGradient, kInPanel, kNowhere };

struct Chunk {
  Range rows;
  Keep keep;
};

constexpr i64 kRowsOfTile = 1024;  // at most

template <typename T>
class Sweeps {
 public:
  Sweeps(const Head<T>& head, const std::vector<Chunk>& chunks, const Gradients<T>& out)
      : head_(head),
        out_(out),
        d_(head.depth),
        most_(largest(chunks, false)),
        strips_(head.width, d_, useful_threads(2.0 * most_ * head.width * d_),
                std::clamp<i64>(kTileBytes / (most_ * i64(sizeof(T))) / 16 * 16, 256, 1008), out.input ? most_ : 0),
        hidden_(most_ * d_),
        tiles_(strips_.threads * most_ * strips_.widest),
        panel_(largest(chunks, true) * head.width),
        bias_sums_(out.bias ? head.width : 0, 0.0) {}

  // What is found of each of the chunk's rows, in their order
  const std::vector<Found>& meet(const Chunk& chunk) {
    start(chunk);
    met_ = true;
    partial_.assign(strips_.threads * n_, {});
    differences_.assign(strips_.threads * n_, 0.0);
    references_.resize(n_ * strips_.count);
    layer_sums_.assign(strips_.threads * d_, 0.0);
    own_.resize(n_);
    each_row([&](i64 i, T* scratch) {
      own_[i] = dot(target_layer(i, scratch), hidden_ + i * d_) + (head_.bias ? head_.bias[target(i)] : 0);
    });
    strips_.over([&](i64 t, const Strip& strip) { meet_strip(t, strip); });
    found_.resize(n_);
    for (i64 i = 0; i < n_; ++i) found_[i] = join(i);
    return found_;
  }

  // What was found of all rows when they were met before
  void recall(const Chunk& chunk, const std::vector<Found>& all) {
    start(chunk);
    met_ = false;
    found_.assign(all.begin() + chunk.rows.begin, all.begin() + chunk.rows.end);
  }

  // The gradients of the sum of shares times losses, of the rows that were met or recalled; shares are of all rows.
  void differentiate(const std::vector<double>& shares) {
    slopes_.resize(n_);
    const double even = head_.smoothing / head_.width;
    for (i64 i = 0; i < n_; ++i) {
      const double share = shares[chunk_.rows.begin + i], pull = head_.z > 0 ? 2 * head_.z * found_[i].lse : 0;
      slopes_[i] = {share * (1 + pull), share * even,
                    share * (pull - (1 + pull) * found_[i].doubt + head_.smoothing - even)};
    }
    if (out_.input && met_)
      finish_input();
    const auto visit = [&](i64 t, const Strip& strip) { differentiate_strip(t, strip); };
    if (out_.input && !met_) {
      strips_.over(visit);
      finish_input();
    } else if (out_.weight || out_.bias) {
      strips_.over_any(visit);
    }
  }

  void finish() const {
    for (size_t j = 0; j < bias_sums_.size(); ++j) out_.bias[j] = static_cast<T>(bias_sums_[j]);
  }

 private:
  static constexpr i64 kTileBytes = i64(7) << 17;

  // Of a row: share softmax - even, but at the target
  struct Slopes {
    double of_softmax, even, at_target;
  };

  static i64 largest(const std::vector<Chunk>& chunks, bool in_panel) {
    i64 most = in_panel ? 0 : 1;
    for (const Chunk& chunk : chunks) {
      if (!in_panel || chunk.keep == Keep::kInPanel)
        most = std::max(most, chunk.rows.size());
    }
    return most;
  }

  void start(const Chunk& chunk) {
    chunk_ = chunk;
    n_ = chunk.rows.size();
    strips_.forget_sums();
    each_row([&](i64 i, T*) { head_.input.load(head_.rows[chunk.rows.begin + i], 1, hidden_ + i * d_, T(1)); });
  }

  // f(row, room for a row of the layer), rows shared among the threads
  template <typename F>
  void each_row(const F& f) const {
    const i64 workers = std::min(strips_.threads, n_);
    run(workers, [&](i64 worker) {
      Buffer<T> scratch(d_);
      for (i64 i = n_ * worker / workers; i < n_ * (worker + 1) / workers; ++i) f(i, scratch);
    });
  }

  i64 target(i64 i) const { return head_.targets[chunk_.rows.begin + i]; }

  const T* target_layer(i64 i, T* scratch) const {
    i64 ld;
    return head_.weight.fetch(target(i), 1, scratch, &ld);
  }

  double dot(const T* a, const T* b) const { return SSLKERNELS_AT_LEVEL(wide_dot(a, b, d_)); }

  T* tile(i64 t) const { return tiles_ + t * most_ * strips_.widest; }

  // Where n_ rows of a strip wait, or null
  T* kept(const Strip& strip) const {
    switch (chunk_.keep) {
      case Keep::kInGradient:
        return out_.weight + strip.begin * d_;
      case Keep::kInPanel:
        return panel_ + strip.begin * n_;
      default:
        return nullptr;
    }
  }

  // what the exponentials of row i in this strip were taken against
  T& reference(const Strip& strip, i64 i) { return references_[strip.number * n_ + i]; }

  void logits(Range strip, const View<T>& layer, T* x) const {
    const i64 m = strip.size();
    multiply<T>({x, n_, m, m, 1}, {hidden_, n_, d_, d_, 1}, layer.transposed());
    if (head_.bias)
      tiles<T>().add(x, m, head_.bias + strip.begin, 0, n_, m);
  }

  void meet_strip(i64 t, const Strip& strip) {
    const i64 m = strip.size();
    const View<T> layer = strips_.layer(head_.weight, t, strip);
    // a product straight into memory that no cache holds would be slower than one copied there
    T *x = tile(t), *keep = kept(strip);
    logits(strip, layer, x);
    for (i64 i = 0; i < n_; ++i) {
      T* row = x + i * m;
      const i64 hole = target(i) - strip.begin;
      if (head_.smoothing > 0) {
        around(hole, m, [&](i64 at, i64 n) {
          differences_[t * n_ + i] += SSLKERNELS_AT_LEVEL(sum_differences(row + at, static_cast<T>(own_[i]), n));
        });
      }
      if (hole >= 0 && hole < m)
        row[hole] = kNone<T>;
      T top, sum = 0;
      tiles<T>().maxima(row, m, 1, m, &top, nullptr);
      Partial& partial = partial_[t * n_ + i];
      const T factor = static_cast<T>(partial.raise(top));
      if (out_.input && factor != 1 && strips_.has_sum(t))
        tiles<T>().scale_rows(strips_.sum(t) + i * d_, d_, strips_.sum(t) + i * d_, d_, &factor, 1, d_);
      T& against = reference(strip, i);
      against = static_cast<T>(partial.max);
      tiles<T>().exp_rows(row, m, 1, m, &against, &sum);
      partial.sum += sum;
      if (keep)
        std::copy_n(row, m, keep + i * m);
    }
    if (!out_.input)
      return;
    strips_.add_product(t, {x, n_, m, m, 1}, layer);
    for (i64 j = 0; head_.smoothing > 0 && j < m; ++j)
      SSLKERNELS_AT_LEVEL(add_to(layer_sums_.data() + t * d_, layer.data + j * layer.row_stride, d_));
  }

  // Joins what the threads know of a row
  Found join(i64 i) const {
    Partial all;
    double differences = 0;
    for (i64 t = 0; t < strips_.threads; ++t) {
      const Partial& own = partial_[t * n_ + i];
      all.raise(own.max);
      all.sum += own.sum * (own.max == kNone<double> ? 1 : std::exp(own.max - all.max));
      differences += differences_[t * n_ + i];
    }
    // as a softmax that subtracts its largest logit
    const double own = std::isinf(own_[i]) && own_[i] > 0 ? std::nan("") : own_[i];
    const double others = all.max == kNone<double> && all.sum == 0 ? all.max : all.max + std::log(all.sum);
    const double gap = others - own, small = std::exp(-std::abs(gap));
    const double above = std::max(gap, 0.0) + std::log1p(small);
    const double lse = own == kNone<double> ? others : own + above;
    double loss = std::isnan(gap) ? gap : above;
    if (head_.smoothing > 0)
      loss -= head_.smoothing * differences / head_.width;
    if (head_.z > 0)
      loss += head_.z * lse * lse;
    return {loss, lse, std::isnan(gap) ? gap : (gap > 0 ? 1 : small) / (1 + small)};
  }

  void differentiate_strip(i64 t, const Strip& strip) {
    const i64 m = strip.size();
    const bool again = !met_ || chunk_.keep == Keep::kNowhere;
    T *g = tile(t), *e = again ? g : kept(strip);
    View<T> layer{};
    if (again) {
      layer = strips_.layer(head_.weight, t, strip);
      logits(strip, layer, g);
    }
    for (i64 i = 0; i < n_; ++i) {
      const double lse = found_[i].lse;
      const T against = again ? static_cast<T>(lse) : reference(strip, i);
      T unused = 0;
      if (again)
        tiles<T>().exp_rows(g + i * m, m, 1, m, &against, &unused);
      const T factor = static_cast<T>(slopes_[i].of_softmax * std::exp(against - lse));
      SSLKERNELS_AT_LEVEL(slopes<T>(g + i * m, e + i * m, m, factor, static_cast<T>(slopes_[i].even)));
      const i64 hole = target(i) - strip.begin;
      if (hole >= 0 && hole < m)
        g[i * m + hole] = static_cast<T>(slopes_[i].at_target);
      if (out_.bias)
        SSLKERNELS_AT_LEVEL(add_to(bias_sums_.data() + strip.begin, g + i * m, m));
    }
    const View<T> slopes{g, n_, m, m, 1};
    if (out_.input && !met_)
      strips_.add_product(t, slopes, layer);
    if (out_.weight)
      accumulate<T>({out_.weight + strip.begin * d_, m, d_, d_, 1}, slopes.transposed(), {hidden_, n_, d_, d_, 1},
                    chunk_.rows.begin > 0, strips_.room(t));
  }

  // The threads' sums together. Of rows that were met they lack the factor of the softmax, the target, and what is the
  // same for all classes.
  void finish_input() {
    const i64 threads = strips_.threads;
    for (i64 t = 1; met_ && t < threads; ++t) {
      for (i64 j = 0; j < d_; ++j) layer_sums_[j] += layer_sums_[t * d_ + j];
    }
    each_row([&](i64 i, T* scratch) {
      T* out = out_.input + head_.rows[chunk_.rows.begin + i] * d_;
      const Slopes& own = slopes_[i];
      for (i64 j = 0; j < d_; ++j) out[j] = met_ ? static_cast<T>(-own.even * layer_sums_[j]) : 0;
      for (i64 t = 0; t < threads; ++t) {
        if (!strips_.has_sum(t))
          continue;
        const double factor = met_ ? own.of_softmax * std::exp(partial_[t * n_ + i].max - found_[i].lse) : 1.0;
        tiles<T>().axpy(out, static_cast<T>(factor), strips_.sum(t) + i * d_, d_);
      }
      if (met_)
        tiles<T>().axpy(out, static_cast<T>(own.at_target + own.even), target_layer(i, scratch), d_);
    });
  }

  const Head<T>& head_;
  const Gradients<T>& out_;
  const i64 d_, most_;
  Strips<T> strips_;
  Buffer<T> hidden_, tiles_, panel_;
  std::vector<double> bias_sums_;
  Chunk chunk_{};
  bool met_ = false;
  i64 n_ = 0;
  std::vector<Found> found_;
  std::vector<Slopes> slopes_;
  std::vector<double> own_, differences_, layer_sums_;  // differences: sum (x - own) of a thread's part of a row
  std::vector<Partial> partial_;
  std::vector<T> references_;
};

// Chunks of at most `most` rows, as even as may be.
void split(Range rows, i64 most, Keep keep, std::vector<Chunk>* out) {
  const i64 times = (rows.size() + most - 1) / most;
  for (i64 k = 0; k < times; ++k)
    out->push_back({{rows.begin + rows.size() * k / times, rows.begin + rows.size() * (k + 1) / times}, keep});
}

// The rule of the family. Where the layer's gradient is wanted, exponentials are kept, in its memory for the first rows
// and in a panel for the rest, or they are computed again, whichever costs less. Costs are counted in rows of a product
// with the layer: to read and to pack the layer costs what kRead rows more would, to add to its gradient kAdd. A panel
// has a ninth of all logits, so 1/27 of what the unfused form needs; at least `panel_bytes`, at most kLarge or what
// the layer takes.
template <typename T>
std::vector<Chunk> plan(const Head<T>& head, const Gradients<T>& out, i64 panel_bytes) {
  constexpr double kRead = 45, kAdd = 55;
  constexpr i64 kLarge = i64(64) << 20;
  const i64 n = head.count(), row = head.width * static_cast<i64>(sizeof(T));
  std::vector<Chunk> best;
  if (!out.weight && !out.bias) {
    split({0, n}, kRowsOfTile, Keep::kNowhere, &best);
    return best;
  }
  const i64 bytes = std::max(panel_bytes, std::min(n * row / 9, std::max(kLarge, row * head.depth)));
  const i64 products = 1 + (out.input ? 1 : 0) + (out.weight ? 1 : 0), reads = out.input ? 2 : 1;
  double least = 0;
  for (const i64 first : {out.weight ? std::min({n, head.depth, kRowsOfTile}) : 0, i64(0)}) {
    for (const Keep rest : {Keep::kInPanel, Keep::kNowhere}) {
      std::vector<Chunk> chunks;
      split({0, first}, std::max<i64>(first, 1), Keep::kInGradient, &chunks);
      split({first, n}, rest == Keep::kInPanel ? std::clamp<i64>(bytes / row, 1, kRowsOfTile) : kRowsOfTile, rest,
            &chunks);
      double cost = out.weight ? -kAdd : 0;
      for (const Chunk& chunk : chunks) {
        const i64 more = chunk.keep == Keep::kNowhere ? 1 : 0;
        cost += (products + more) * chunk.rows.size() + (reads + more) * kRead + (out.weight ? kAdd : 0);
      }
      if (best.empty() || cost < least) {
        best = chunks;
        least = cost;
      }
    }
  }
  return best;
}

template <typename T>
Tensor room(const Tensor& like, bool wanted) {
  std::vector<i64> sizes{0};
  if (wanted) {
    sizes.clear();
    for (i64 k = 0; k < like.dim(); ++k) sizes.push_back(like.size(k));
  }
  return empty(sizes, kScalar<T>);
}

// Gradients in T, what nobody will write filled with zeros.
template <typename T>
struct Outputs {
  Outputs(const Head<T>& head, const Tensor& input, const Tensor& weight, const Optional& bias,
          const std::vector<bool>& mask)
      : input(room<T>(input, mask[0])),
        weight(room<T>(weight, mask[1])),
        bias(room<T>(bias ? *bias : weight, mask[2])) {
    if (mask[0] && head.count() < head.total) {
      over_rows(head.total, kFlopsAnElement * head.total * head.depth, [&](Range mine) {
        std::fill_n(data<T>(this->input) + mine.begin * head.depth, mine.size() * head.depth, T(0));
      });
    }
    if (head.count() == 0) {
      std::fill_n(data<T>(this->weight), this->weight.numel(), T(0));
      std::fill_n(data<T>(this->bias), this->bias.numel(), T(0));
    }
    to = {mask[0] ? data<T>(this->input) : nullptr, mask[1] ? data<T>(this->weight) : nullptr,
          mask[2] ? data<T>(this->bias) : nullptr};
  }

  Tensor input, weight, bias;
  Gradients<T> to;
};

bool wide(const Tensor& input, const Tensor& weight, const Optional& bias) {
  return is_double(input) || is_double(weight) || (bias && is_double(*bias));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& input, const Tensor& weight,
                                                                const Optional& bias, const Tensor& target,
                                                                i64 ignore_index, double smoothing, double z, bool mean,
                                                                i64 panel_bytes, std::vector<bool> mask) {
  return with_type(wide(input, weight, bias), [&](auto zero) {
    using T = decltype(zero);
    const Head<T> head(input, weight, bias, target, ignore_index, smoothing, z);
    Outputs<T> out(head, input, weight, bias, mask);
    const double norm = mean ? 1.0 / head.count() : 1.0;
    double total = 0;
    if (head.count() > 0) {
      const std::vector<Chunk> chunks = plan(head, out.to, panel_bytes);
      Sweeps<T> sweeps(head, chunks, out.to);
      const std::vector<double> shares(head.count(), norm);
      for (const Chunk& chunk : chunks) {
        for (const Found& row : sweeps.meet(chunk)) total += row.loss;
        sweeps.differentiate(shares);
      }
      sweeps.finish();
    }
    Tensor loss = empty({}, kScalar<T>);
    *data<T>(loss) = static_cast<T>(mean ? total / head.count() : total);
    return std::make_tuple(loss, out.input, out.weight, out.bias);
  });
}

// also the log-sum-exp of each row, what its rounding lost, and the doubt
std::tuple<Tensor, Tensor> linear_cross_entropy_rows(const Tensor& input, const Tensor& weight, const Optional& bias,
                                                     const Tensor& target, i64 ignore_index, double smoothing,
                                                     double z) {
  return with_type(wide(input, weight, bias), [&](auto zero) {
    using T = decltype(zero);
    const Head<T> head(input, weight, bias, target, ignore_index, smoothing, z);
    const Gradients<T> none{};
    Tensor loss = empty({head.total}, kScalar<T>), stats = empty({3, head.total}, kScalar<T>);
    std::fill_n(data<T>(loss), head.total, T(0));
    std::fill_n(data<T>(stats), 3 * head.total, T(0));
    std::vector<Chunk> chunks = plan(head, none, 0);
    Sweeps<T> sweeps(head, chunks, none);
    for (const Chunk& chunk : chunks) {
      const i64* at = head.rows.data() + chunk.rows.begin;
      for (const Found& row : sweeps.meet(chunk)) {
        const T rounded = static_cast<T>(row.lse);
        T* out = data<T>(stats) + *at;
        out[0] = rounded;
        out[head.total] = std::isfinite(row.lse) ? static_cast<T>(row.lse - rounded) : T(0);
        out[2 * head.total] = static_cast<T>(row.doubt);
        data<T>(loss)[*at++] = static_cast<T>(row.loss);
      }
    }
    return std::make_tuple(loss, stats);
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_rows_backward(const Tensor& grad, const Tensor& input,
                                                                      const Tensor& weight, const Optional& bias,
                                                                      const Tensor& target, const Tensor& stats,
                                                                      i64 ignore_index, double smoothing, double z,
                                                                      std::vector<bool> mask) {
  return with_type(wide(input, weight, bias), [&](auto zero) {
    using T = decltype(zero);
    const Head<T> head(input, weight, bias, target, ignore_index, smoothing, z);
    Outputs<T> out(head, input, weight, bias, mask);
    if (head.count() > 0) {
      const Tensor wide_grad = torch::stable::contiguous(torch::stable::to(grad, kScalar<T>));
      const T* known = data<T>(stats);
      std::vector<double> shares;
      std::vector<Found> found;
      for (const i64 i : head.rows) {
        shares.push_back(data<T>(wide_grad)[i]);
        found.push_back({0, static_cast<double>(known[i]) + known[head.total + i], known[2 * head.total + i]});
      }
      std::vector<Chunk> chunks;
      split({0, head.count()}, kRowsOfTile, Keep::kNowhere, &chunks);
      Sweeps<T> sweeps(head, chunks, out.to);
      for (const Chunk& chunk : chunks) {
        sweeps.recall(chunk, found);
        sweeps.differentiate(shares);
      }
      sweeps.finish();
    }
    const auto as = [&](const Tensor& x, const Tensor& like, bool wanted) {
      return wanted ? torch::stable::to(x, like.scalar_type()) : x;
    };
    return std::make_tuple(as(out.input, input, mask[0]), as(out.weight, weight, mask[1]),
                           mask[2] ? as(out.bias, *bias, true) : out.bias);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  library.impl("linear_cross_entropy_rows", TORCH_BOX(&linear_cross_entropy_rows));
  library.impl("linear_cross_entropy_rows_backward", TORCH_BOX(&linear_cross_entropy_rows_backward));
}

}  // namespace sslkernels
