// SPDX-License-Identifier: Apache-2.0
// Log-sum-exp sweeps: rows and columns, forward and backward, and the one-sided online form.
#include "cpu/contrastive.h"

namespace sslkernels {

namespace {

// 0 * -inf is NaN; a multiplier this small gives the same sum and keeps an excluded pair excluded
template <typename T>
T multiplier(double beta) {
  return static_cast<T>(std::max(beta, 1e-30));
}

}  // namespace

template <typename T>
LseResult lse_forward(const Tensor& q_tensor, const Tensor& k_tensor, T scale, const Exclusion& exclusion,
                      const std::vector<double>& betas, bool columns, Scores scores, bool self) {
  Sweep<T> s(q_tensor, k_tensor, scale, exclusion, self);
  const bool keep_scores = scores != Scores::kDropped;
  const i64 channels = static_cast<i64>(betas.size()), r = s.panel_rows, c = s.tile_cols;
  LseResult out{empty({channels, s.n}, kScalar<T>),
                columns ? empty({channels, s.m}, kScalar<T>) : empty({0}, kScalar<T>), empty({s.n}, kScalar<T>),
                keep_scores ? empty({s.n, s.m}, kScalar<T>) : empty({0}, kScalar<T>)};
  // a symmetric matrix has its columns' sums in its rows'
  T *row_max = data<T>(out.row), *top = data<T>(out.top), *kept = data<T>(out.scores);
  Buffer<T> row_sum(channels * s.n), col_only(columns && !self ? channels * s.m : 0);
  T* col_max = self ? row_max : columns ? data<T>(out.col) : nullptr;
  T* col_sum = self ? static_cast<T*>(row_sum) : static_cast<T*>(col_only);
  std::fill_n(row_max, channels * s.n, kNone<T>);
  std::fill_n(static_cast<T*>(row_sum), channels * s.n, T(0));
  std::fill_n(top, s.n, kNone<T>);
  if (columns && !self) {
    std::fill_n(col_max, channels * s.m, kNone<T>);
    std::fill_n(col_sum, channels * s.m, T(0));
  }
  // of each thread: running row maxima, sums and tops of the panel, and the maxima, references and sums of a tile
  Buffer<T> partial(s.threads * (2 * channels + 1) * r), work(s.threads * 3 * (r + c));

  for (i64 p = 0; p < s.panels(); ++p) {
    const Range rows = s.panel(p);
    s.enter(rows);
    run(s.threads, [&](i64 t) {
      T* mine = partial + t * (2 * channels + 1) * r;
      T *high = mine, *sum = mine + channels * r, *tops = mine + 2 * channels * r;
      T *tile_row = work + t * 3 * (r + c), *tile_col = tile_row + r;
      T *ref_row = tile_col + c, *ref_col = ref_row + r, *sum_row = ref_col + c, *sum_col = sum_row + r;
      std::fill_n(high, channels * r, kNone<T>);
      std::fill_n(sum, channels * r, T(0));
      std::fill_n(tops, r, kNone<T>);
      const auto skipped = [&](Range cols) {
        for (i64 i = rows.begin; keep_scores && i < rows.end; ++i) {
          std::fill_n(kept + i * s.m + cols.begin, cols.size(), kNone<T>);
        }
      };
      s.for_tiles(
          rows, t,
          [&](Range cols) {
            const i64 nr = rows.size(), nc = cols.size();
            const bool by_column = self ? cols.begin >= rows.end : columns;
            T* tile = keep_scores ? kept + rows.begin * s.m + cols.begin : s.score_tile(t);
            const i64 ld = keep_scores ? s.m : c;
            s.scores(rows, cols, s.keys(t, cols), tile, ld);
            s.tile.maxima(tile, ld, nr, nc, tile_row, by_column ? tile_col : nullptr);
            for (i64 i = 0; i < nr; ++i) tops[i] = std::max(tops[i], tile_row[i]);
            if (self && by_column) {
              for (i64 j = 0; j < nc; ++j) top[cols.begin + j] = std::max(top[cols.begin + j], tile_col[j]);
            }
            T lowest = std::numeric_limits<T>::infinity(), highest = kNone<T>;
            if (by_column) {
              bounds(tile_row, nr, &lowest, &highest);
              bounds(tile_col, nc, &lowest, &highest);
            }
            for (i64 b = 0; b < channels; ++b) {
              const T beta = multiplier<T>(betas[b]);
              s.tile.scale_rows(ref_row, nr, tile_row, nr, &beta, 1, nr);
              if (by_column)
                s.tile.scale_rows(ref_col, nc, tile_col, nc, &beta, 1, nc);
              if (by_column && highest > kNone<T> && comparable(beta * lowest, beta * highest)) {
                s.tile.sum_exp(tile, ld, nr, nc, beta, highest, sum_row, sum_col);
                // merged by their own maxima: against that of the tile, another tile's sum could count for nothing
                s.tile.rebase(nr, beta * highest, ref_row, sum_row);
                s.tile.rebase(nc, beta * highest, ref_col, sum_col);
              } else {
                s.tile.sum_exp_rows(tile, ld, nr, nc, beta, tile_row, sum_row);
                if (by_column)
                  s.tile.sum_exp_cols(tile, ld, nr, nc, beta, tile_col, sum_col);
              }
              s.tile.merge(nr, high + b * r, sum + b * r, ref_row, sum_row);
              if (by_column) {
                const i64 at = b * s.m + cols.begin;
                s.tile.merge(nc, col_max + at, col_sum + at, ref_col, sum_col);
              }
            }
          },
          skipped);
    });
    for (i64 t = 0; t < s.threads; ++t) {
      const T* mine = partial + t * (2 * channels + 1) * r;
      for (i64 b = 0; b < channels; ++b) {
        const i64 at = b * s.n + rows.begin;
        s.tile.merge(rows.size(), row_max + at, row_sum + at, mine + b * r, mine + (channels + b) * r);
      }
      const T* tops = mine + 2 * channels * r;
      for (i64 i = 0; i < rows.size(); ++i) top[rows.begin + i] = std::max(top[rows.begin + i], tops[i]);
    }
    // below the diagonal block nothing is computed or read; what leaves the op is defined all the same
    const bool leaves = self && scores == Scores::kReturned;
    for (i64 i = rows.begin; leaves && i < rows.end; ++i) std::fill_n(kept + i * s.m, rows.begin, T(0));
  }
  for (i64 i = 0; i < channels * s.n; ++i) row_max[i] = log_sum(row_max[i], row_sum[i]);
  for (i64 j = 0; columns && !self && j < channels * s.m; ++j) col_max[j] = log_sum(col_max[j], col_sum[j]);
  return out;
}

template <typename T>
Gradients lse_backward(const Tensor& q_tensor, const Tensor& k_tensor, T scale, const Exclusion& exclusion,
                       const std::vector<double>& betas, Side<T> row, Side<T> col, const T* kept, bool self,
                       bool want_q, bool want_k, bool want_scale) {
  Sweep<T> s(q_tensor, k_tensor, scale, exclusion, self);
  s.set_diagonal_cost(kept ? 1.0 / 2 : 2.0 / 3);  // products: scores unless kept, W k, and W^T q off the diagonal
  const i64 channels = static_cast<i64>(betas.size()), r = s.panel_rows, c = s.tile_cols;
  Gradients out = gradient_tensors(s, want_q, want_k, want_scale);
  T* u_q = out.q.dim() == 2 ? data<T>(out.q) : nullptr;
  T* u_k = self ? u_q : want_k ? data<T>(out.k) : nullptr;
  if (!row.grad && !col.grad) {
    if (u_q)
      std::fill_n(u_q, s.n * s.d, T(0));
    if (u_k)
      std::fill_n(u_k, s.m * s.d, T(0));
    if (!want_q)
      out.q = empty({0}, kScalar<T>);
    return out;
  }
  Products<T> products(s, u_q, u_k);
  Buffer<T> factors(s.threads * (r + c)), sums(channels > 1 ? s.threads * r * c : 0);

  for (i64 p = 0; p < s.panels(); ++p) {
    const Range rows = s.panel(p);
    s.enter(rows);
    run(s.threads, [&](i64 t) {
      T *row_factor = factors + t * (r + c), *col_factor = row_factor + r;
      s.for_tiles(
          rows, t,
          [&](Range cols) {
            const i64 nr = rows.size(), nc = cols.size();
            const View<T> key = s.keys(t, cols);
            const T* tile = s.score_tile(t);
            i64 ld = c;
            if (kept) {
              tile = kept + rows.begin * s.m + cols.begin;
              ld = s.m;
            } else {
              s.scores(rows, cols, key, s.score_tile(t), c);
            }
            T* weights = channels > 1 ? sums + t * r * c : s.score_tile(t);
            for (i64 b = 0; b < channels; ++b) {
              const T beta = multiplier<T>(betas[b]), weight = static_cast<T>(betas[b]);
              const T* row_lse = row.grad ? row.lse + b * s.n + rows.begin : nullptr;
              const T* col_lse = col.grad ? col.lse + b * s.m + cols.begin : nullptr;
              const T* row_grad = row.grad ? row.grad + b * s.n + rows.begin : nullptr;
              const T* col_grad = col.grad ? col.grad + b * s.m + cols.begin : nullptr;
              T lowest = std::numeric_limits<T>::infinity(), highest = kNone<T>;
              if (row_lse && col_lse) {
                bounds(row_lse, nr, &lowest, &highest);
                bounds(col_lse, nc, &lowest, &highest);
              }
              if (row_lse && col_lse && highest > kNone<T> && comparable(lowest, highest)) {
                const T ref = (lowest + highest) / 2;
                s.tile.factors(nr, ref, row_lse, row_grad, weight, row_factor);
                s.tile.factors(nc, ref, col_lse, col_grad, weight, col_factor);
                s.tile.weights(tile, ld, weights, c, nr, nc, beta, ref, row_factor, col_factor, b > 0);
              } else {
                if (row_lse)
                  s.tile.scale_rows(row_factor, nr, row_grad, nr, &weight, 1, nr);
                if (col_lse)
                  s.tile.scale_rows(col_factor, nc, col_grad, nc, &weight, 1, nc);
                s.tile.weights_wide(tile, ld, weights, c, nr, nc, beta, row_lse, row_lse ? row_factor : nullptr,
                                    col_lse, col_lse ? col_factor : nullptr, b > 0);
              }
            }
            products.add(t, rows, cols, weights, c, key, s.queries(rows));
          },
          [&](Range cols) { products.skip(rows, cols); });
    });
    products.leave(rows);
  }
  finish_gradients(s, scale, want_q, want_k, want_scale, &out);
  return out;
}

template <typename T>
AttentionResult attention(const Tensor& q_tensor, const Tensor& k_tensor, T scale, const Exclusion& exclusion) {
  Sweep<T> s(q_tensor, k_tensor, scale, exclusion, false);
  const i64 r = s.panel_rows, d = s.d;
  AttentionResult out{empty({s.n}, kScalar<T>), empty({s.n}, kScalar<T>), empty({s.n, d}, kScalar<T>)};
  T *lse = data<T>(out.lse), *top = data<T>(out.top);
  Products<T> products(s, data<T>(out.context), nullptr);
  Buffer<T> refs(s.threads * r), sums(s.threads * r), tops(s.threads * r), tile_max(s.threads * r);

  for (i64 p = 0; p < s.panels(); ++p) {
    const Range rows = s.panel(p);
    s.enter(rows);
    run(s.threads, [&](i64 t) {
      T *ref = refs + t * r, *sum = sums + t * r, *best = tops + t * r, *high = tile_max + t * r;
      std::fill_n(ref, r, kNone<T>);
      std::fill_n(best, r, kNone<T>);
      std::fill_n(sum, r, T(0));
      s.for_tiles(
          rows, t,
          [&](Range cols) {
            const View<T> key = s.keys(t, cols);
            T* tile = s.score_tile(t);
            s.scores(rows, cols, key, tile, s.tile_cols);
            s.tile.maxima(tile, s.tile_cols, rows.size(), cols.size(), high, nullptr);
            T* context = products.thread_part(t);
            for (i64 i = 0; i < rows.size(); ++i) {
              best[i] = std::max(best[i], high[i]);
              // a reference up to 8 below the maximum costs no accuracy and spares most of the rescaling
              if (!(high[i] > ref[i] + 8))
                continue;
              const T shrink = std::exp(ref[i] - high[i]);
              ref[i] = high[i];
              sum[i] *= shrink;
              if (context)
                s.tile.scale_rows(context + i * d, d, context + i * d, d, &shrink, 1, d);
            }
            s.tile.exp_rows(tile, s.tile_cols, rows.size(), cols.size(), ref, sum);
            products.add(t, rows, cols, tile, s.tile_cols, key, s.queries(rows));
          },
          [](Range) {});
    });
    for (i64 i = 0; i < rows.size(); ++i) {
      T high = kNone<T>, best = kNone<T>, sum = 0;
      for (i64 t = 0; t < s.threads; ++t) {
        high = std::max(high, refs[t * r + i]);
        best = std::max(best, tops[t * r + i]);
      }
      const T ref = high == kNone<T> ? T(0) : high;
      for (i64 t = 0; t < s.threads; ++t) sum += sums[t * r + i] * std::exp(refs[t * r + i] - ref);
      lse[rows.begin + i] = log_sum(high, sum);
      top[rows.begin + i] = best;
      for (i64 t = 0; t < s.threads; ++t) {
        sums[t * r + i] = sum == 0 ? T(0) : std::exp(refs[t * r + i] - ref) / sum;
      }
    }
    run(s.threads, [&](i64 t) {
      if (T* mine = products.thread_part(t))
        s.tile.scale_rows(mine, d, mine, d, sums + t * r, rows.size(), d);
    });
    products.leave(rows);
  }
  return out;
}

#define INSTANTIATE(T)                                                                                              \
  template LseResult lse_forward<T>(const Tensor&, const Tensor&, T, const Exclusion&, const std::vector<double>&,  \
                                    bool, Scores, bool);                                                            \
  template Gradients lse_backward<T>(const Tensor&, const Tensor&, T, const Exclusion&, const std::vector<double>&, \
                                     Side<T>, Side<T>, const T*, bool, bool, bool, bool);                           \
  template AttentionResult attention<T>(const Tensor&, const Tensor&, T, const Exclusion&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace sslkernels
