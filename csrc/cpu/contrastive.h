// SPDX-License-Identifier: Apache-2.0
// The sweeps behind the contrastive ops; what each computes is defined in sslkernels/reference/contrastive.py.
#pragma once

#include "cpu/sweep.h"

namespace sslkernels {

// Log-sum-exps over rows (and columns), a row of `row` and `col` for each multiplier in `betas`. Scores are kept for a
// backward inside the op, or returned for one outside it.
struct LseResult {
  Tensor row, col, top, scores;
};
enum class Scores { kDropped, kKept, kReturned };
template <typename T>
LseResult lse_forward(const Tensor& q, const Tensor& k, T scale, const Exclusion& exclusion,
                      const std::vector<double>& betas, bool columns, Scores scores, bool self);

// What a backward knows of one side: a log-sum-exp and the weight of its gradient, (multipliers, rows); may be absent.
template <typename T>
struct Side {
  const T* lse = nullptr;
  const T* grad = nullptr;
};

struct Gradients {
  Tensor q, k;
  double scale = 0;
};

// dq, dk and dscale in the arithmetic dtype; `scores` are those kept by the forward, or null.
template <typename T>
Gradients lse_backward(const Tensor& q, const Tensor& k, T scale, const Exclusion& exclusion,
                       const std::vector<double>& betas, Side<T> rows, Side<T> cols, const T* scores, bool self,
                       bool want_q, bool want_k, bool want_scale);

// Row log-sum-exps and the softmax-weighted sum of keys of each row, online, in one sweep.
struct AttentionResult {
  Tensor lse, top, context;
};
template <typename T>
AttentionResult attention(const Tensor& q, const Tensor& k, T scale, const Exclusion& exclusion);

// scale <q_i, k_j> with j = i + offset modulo the keys, (N,)
template <typename T>
Tensor positive_scores(const Tensor& q, const Tensor& k, T scale, i64 offset);

// Adds what comes through positive_scores to dq and dk (null where not wanted; of a self-similarity to dq alone), and
// returns its part of dscale.
template <typename T>
double add_positive_gradients(const Tensor& q, const Tensor& k, T scale, i64 offset, const T* grad, T* dq, T* dk,
                              bool self, bool want_scale);

// Unit rows of the tensors, one below the other, in their dtype, and the norms; and the gradient of some of the rows.
struct UnitRows {
  Tensor z, norm;
};
template <typename T>
UnitRows normalize_rows(const std::vector<Tensor>& xs, double eps);
template <typename T>
Tensor normalize_rows_backward(const Tensor& grad, const Tensor& z, const Tensor& norm, double eps, Range wanted);

// One panel of exponentials at a time: row log-sum-exps, then all gradients, from one product q k^T. `slope` maps a
// row's log-sum-exp to the weight of its gradient.
struct OneSweepResult {
  Tensor lse, top;
  Gradients gradients;
};
template <typename T>
bool fits_one_sweep(i64 n, i64 m);
template <typename T, typename F>
OneSweepResult one_sweep(const Tensor& q, const Tensor& k, T scale, const Exclusion& exclusion, bool want_q,
                         bool want_k, bool want_scale, const F& slope);

// What every op does with its arguments and results

template <typename T>
T value(const std::optional<Tensor>& tensor, double number) {
  if (!tensor)
    return static_cast<T>(number);
  T out;
  Operand<T>(torch::stable::reshape(*tensor, {1, 1})).load(0, 1, &out, T(1));
  return out;
}

template <typename T>
Tensor scalar(double x, bool wanted) {
  if (!wanted)
    return empty({0}, kScalar<T>);
  Tensor out = empty({}, kScalar<T>);
  *data<T>(out) = static_cast<T>(x);
  return out;
}

inline Tensor cast(const Tensor& x, const Tensor& like) {
  return x.scalar_type() == like.scalar_type() ? x : torch::stable::to(x, like.scalar_type());
}

template <typename T>
Tensor dense(const Tensor& x) {
  return torch::stable::contiguous(x.scalar_type() == kScalar<T> ? x : torch::stable::to(x, kScalar<T>));
}

template <typename T>
T log_sum(T max, T sum) {
  if (max == kNone<T>)
    return std::isnan(sum) ? sum : max;
  return max == std::numeric_limits<T>::infinity() ? max : max + std::log(sum);
}

template <typename T>
bool comparable(T low, T high) {
  // exponentials of a tile share one reference while the largest over the smallest is far from overflow and underflow
  return high - low <= (std::is_same_v<T, double> ? T(300) : T(60));
}

// Smallest and largest of the finite values.
template <typename T>
void bounds(const T* x, i64 n, T* low, T* high) {
  T a = *low, b = *high;
  for (i64 i = 0; i < n; ++i) {
    const bool none = x[i] == kNone<T>;
    a = !none && x[i] < a ? x[i] : a;
    b = x[i] > b ? x[i] : b;
  }
  *low = a;
  *high = b;
}

template <typename T>
Gradients gradient_tensors(const Sweep<T>& s, bool want_q, bool want_k, bool want_scale) {
  const auto tensor = [&](i64 rows, bool want) {
    return want ? empty({rows, s.d}, kScalar<T>) : empty({0}, kScalar<T>);
  };
  Gradients g;
  g.q = tensor(s.n, want_q || (want_scale && !want_k));
  g.k = s.self ? g.q : tensor(s.m, want_k);
  if (want_k && s.n == 0)
    std::fill_n(data<T>(g.k), s.m * s.d, T(0));  // no panel will write it
  return g;
}

// Scales the accumulated products into gradients; drops what only the scale's gradient needed.
template <typename T>
void finish_gradients(const Sweep<T>& s, T scale, bool want_q, bool want_k, bool want_scale, Gradients* g) {
  const bool by_query = g->q.dim() == 2;
  if (by_query) {
    g->scale = finish(s.q, scale, data<T>(g->q), want_scale);
    if (s.self)
      g->scale /= 2;  // each pair was met from both of its ends
  }
  if (!s.self && want_k) {
    const double dot = finish(s.k, scale, data<T>(g->k), want_scale && !by_query);
    if (!by_query)
      g->scale = dot;
  }
  if (!want_q && by_query)
    g->q = empty({0}, kScalar<T>);
}

template <typename T, typename F>
OneSweepResult one_sweep(const Tensor& q_tensor, const Tensor& k_tensor, T scale, const Exclusion& exclusion,
                         bool want_q, bool want_k, bool want_scale, const F& slope) {
  constexpr i64 kCachedBytes = i64(3) << 20;
  Sweep<T> s(q_tensor, k_tensor, scale, exclusion, false, kCachedBytes);
  OneSweepResult out{empty({s.n}, kScalar<T>), empty({s.n}, kScalar<T>),
                     gradient_tensors(s, want_q, want_k, want_scale)};
  T *lse = data<T>(out.lse), *top = data<T>(out.top);
  Products<T> products(s, out.gradients.q.dim() == 2 ? data<T>(out.gradients.q) : nullptr,
                       want_k ? data<T>(out.gradients.k) : nullptr);
  const i64 r = s.panel_rows;
  Buffer<T> exps(r * s.m), maxima(s.threads * r), sums(s.threads * r), factors(s.threads * r), tops(s.threads * r);
  Buffer<T> weighted(s.threads * r * s.d);
  for (i64 p = 0; p < s.panels(); ++p) {
    const Range rows = s.panel(p);
    s.enter(rows);
    run(s.threads, [&](i64 t) {
      T *high = maxima + t * r, *sum = sums + t * r, *tile_max = tops + t * r;
      std::fill_n(high, rows.size(), kNone<T>);
      std::fill_n(sum, rows.size(), T(0));
      const auto skipped = [&](Range cols) {
        for (i64 i = 0; i < rows.size(); ++i) std::fill_n(exps + i * s.m + cols.begin, cols.size(), kNone<T>);
      };
      s.for_tiles(
          rows, t,
          [&](Range cols) {
            T* tile = exps + cols.begin;
            s.scores(rows, cols, s.keys(t, cols), tile, s.m);
            s.tile.maxima(tile, s.m, rows.size(), cols.size(), tile_max, nullptr);
            for (i64 i = 0; i < rows.size(); ++i) high[i] = std::max(high[i], tile_max[i]);
          },
          skipped);
      const auto exponentials = [&](Range cols) {
        s.tile.exp_rows(exps + cols.begin, s.m, rows.size(), cols.size(), high, sum);
      };
      s.for_tiles(rows, t, exponentials, exponentials);
    });
    for (i64 i = 0; i < rows.size(); ++i) {
      T high = kNone<T>, sum = 0;
      for (i64 t = 0; t < s.threads; ++t) high = std::max(high, maxima[t * r + i]);
      const T ref = high == kNone<T> ? T(0) : high;
      for (i64 t = 0; t < s.threads; ++t) sum += sums[t * r + i] * std::exp(maxima[t * r + i] - ref);
      const T total = log_sum(high, sum);
      lse[rows.begin + i] = total;
      top[rows.begin + i] = high;
      const T weight = slope(rows.begin + i, total);
      for (i64 t = 0; t < s.threads; ++t) {
        factors[t * r + i] = total == kNone<T> ? T(0) : weight * std::exp(maxima[t * r + i] - total);
      }
    }
    run(s.threads, [&](i64 t) {
      T* query = weighted + t * r * s.d;
      const View<T> raw = s.queries(rows);
      const T* factor = factors + t * r;
      s.tile.scale_rows(query, s.d, raw.data, raw.row_stride, factor, rows.size(), s.d);
      const auto add = [&](Range cols) {
        products.add(t, rows, cols, exps + cols.begin, s.m, s.keys(t, cols), {query, rows.size(), s.d, s.d, 1});
      };
      s.for_tiles(rows, t, add, [&](Range cols) { products.skip(rows, cols); });
      if (T* mine = products.thread_part(t))
        s.tile.scale_rows(mine, s.d, mine, s.d, factor, rows.size(), s.d);
    });
    products.leave(rows);
  }
  finish_gradients(s, scale, want_q, want_k, want_scale, &out.gradients);
  return out;
}

template <typename T>
bool fits_one_sweep(i64 n, i64 m) {
  constexpr i64 kPanelBytes = i64(64) << 20;
  return std::min<i64>(n, 64) * m * i64(sizeof(T)) <= kPanelBytes;
}

}  // namespace sslkernels
