// SPDX-License-Identifier: Apache-2.0
// What every sweep over the pairs of two feature matrices shares: row panels, column strips that a thread owns, and the
// products of a tile's weights with the features.
#pragma once

#include "cpu/exclusion.h"

namespace sslkernels {

// Row panels of q against column strips of k. Threads own columns, so gradients of k need no lock and no copy a thread;
// gradients of q are summed over threads after each panel. Panels depend on the shape alone, never on the threads.
template <typename T>
class Sweep {
 public:
  Sweep(const Tensor& q_tensor, const Tensor& k_tensor, T scale, const Exclusion& exclusion, bool self,
        i64 panel_bytes = std::numeric_limits<i64>::max())
      : q(q_tensor),
        k(k_tensor),
        n(q.rows),
        m(k.rows),
        d(q.cols),
        self(self),
        panel_rows(rows_of_a_panel(n, m, exclusion.sparse(), self, panel_bytes)),
        tile_cols(exclusion.sparse() ? panel_rows : 512),
        threads(useful_threads(2.0 * std::min(panel_rows, n) * m * d)),
        tile(tiles<T>()),
        exclusion(exclusion),
        scale_(scale),
        scaled_(panel_rows * d),
        raw_(panel_rows * d),
        keys_(threads * tile_cols * d),
        scores_(threads * panel_rows * tile_cols) {}

  i64 panels() const { return (n + panel_rows - 1) / panel_rows; }
  Range panel(i64 p) const { return {p * panel_rows, std::min(n, (p + 1) * panel_rows)}; }

  // Make a panel current: its rows times scale for scores, and as they are for gradients.
  void enter(Range rows) {
    q.load(rows.begin, rows.size(), scaled_, scale_);
    query_ = q.fetch(rows.begin, rows.size(), raw_, &query_ld_);
  }

  View<T> queries(Range rows) const { return {query_, rows.size(), d, query_ld_, 1}; }

  // Calls f(cols) for each tile of thread t's strip that `exclusion` leaves something of, g(cols) for the others.
  // A self-similarity starts at the diagonal, and no tile straddles the panel's diagonal block.
  template <typename F, typename G>
  void for_tiles(Range rows, i64 t, const F& f, const G& g) const {
    const Range strip{boundary(rows, t), boundary(rows, t + 1)};
    const i64 middle = self ? std::clamp(rows.end, strip.begin, strip.end) : strip.begin;
    for (const Range segment : {Range{strip.begin, middle}, Range{middle, strip.end}}) {
      const i64 count = (segment.size() + tile_cols - 1) / tile_cols;
      for (i64 i = 0; i < count; ++i) {
        const Range cols = part(segment.begin, segment.end, i, count);
        if (exclusion.leaves_nothing(rows, cols)) {
          g(cols);
        } else {
          f(cols);
        }
      }
    }
  }

  View<T> keys(i64 t, Range cols) const {
    i64 ld;
    const T* x = k.fetch(cols.begin, cols.size(), keys_ + t * tile_cols * d, &ld);
    return {x, cols.size(), d, ld, 1};
  }

  // s = scale q k^T of one tile, -inf where a pair is left out.
  void scores(Range rows, Range cols, const View<T>& key, T* s, i64 ld) const {
    multiply<T>({s, rows.size(), cols.size(), ld, 1}, {scaled_, rows.size(), d, d, 1}, key.transposed());
    exclusion.apply(s, ld, rows, cols);
  }

  // What a column of the diagonal block costs, as a share of another: the symmetric half of its products is not needed.
  void set_diagonal_cost(double cost) { diagonal_cost_ = cost; }

  T* score_tile(i64 t) const { return scores_ + t * panel_rows * tile_cols; }

  const Operand<T> q, k;
  const i64 n, m, d;
  const bool self;
  const i64 panel_rows, tile_cols, threads;
  const Tiles<T>& tile;
  const Exclusion& exclusion;

 private:
  // By the shape alone, as a backward must find the panels of its forward. Small panels skip more: the part below the
  // diagonal of a small self-similarity, and the pairs of different groups. `bytes` bounds a panel that is kept whole.
  static i64 rows_of_a_panel(i64 n, i64 m, bool sparse, bool self, i64 bytes) {
    if (sparse)
      return 64;
    const i64 rows = n >= (self ? 1024 : 256) ? 256 : n >= 256 ? 128 : 64;
    return std::clamp<i64>(bytes / std::max<i64>(1, m * i64(sizeof(T))) / 16 * 16, 64, rows);
  }

  // First column of thread t's strip
  i64 boundary(Range rows, i64 t) const {
    if (!self)
      return part(0, m, t, threads).begin;
    if (t == threads)
      return m;
    const double diagonal = diagonal_cost_ * rows.size(), before = (diagonal + m - rows.end) * t / threads;
    const double columns = before < diagonal ? before / diagonal_cost_ : rows.size() + before - diagonal;
    return std::min(m, rows.begin + static_cast<i64>(columns) / 16 * 16);
  }

  T scale_;
  double diagonal_cost_ = 1;
  Buffer<T> scaled_, raw_, keys_, scores_;
  const T* query_ = nullptr;
  i64 query_ld_ = 0;
};

// Accumulates u_q = W k and u_k = W^T q over the tiles of a sweep; a self-similarity has one u for both.
template <typename T>
class Products {
 public:
  // u_q or u_k may be null; in a self-similarity they are the same.
  Products(const Sweep<T>& sweep, T* u_q, T* u_k)
      : s_(sweep),
        u_q_(u_q),
        u_k_(u_k),
        parts_(u_q ? sweep.threads * sweep.panel_rows * sweep.d : 0),
        product_(sweep.threads * std::max(sweep.panel_rows, sweep.tile_cols) * sweep.d),
        started_(sweep.threads, false) {}

  // W of one tile, (rows, cols) with row stride ldw; by thread t
  void add(i64 t, Range rows, Range cols, const T* w, i64 ldw, const View<T>& key, const View<T>& query) {
    const View<T> weights{w, rows.size(), cols.size(), ldw, 1};
    if (u_q_) {
      accumulate(t, parts_ + t * s_.panel_rows * s_.d, rows.size(), started_[t], weights, key);
      started_[t] = true;
    }
    if (u_k_ && !(s_.self && cols.begin < rows.end)) {
      accumulate(t, u_k_ + cols.begin * s_.d, cols.size(), rows.begin > 0, weights.transposed(), query);
    }
  }

  // A tile that adds nothing: the first panel still owes its columns a value.
  void skip(Range rows, Range cols) {
    if (u_k_ && rows.begin == 0 && !(s_.self && cols.begin < rows.end)) {
      std::fill_n(u_k_ + cols.begin * s_.d, cols.size() * s_.d, T(0));
    }
  }

  T* thread_part(i64 t) { return started_[t] ? parts_ + t * s_.panel_rows * s_.d : nullptr; }

  // After all threads have added their tiles of a panel: its rows of u_q, times an optional factor a row and thread.
  void leave(Range rows) {
    if (!u_q_)
      return;
    const i64 d = s_.d;
    run(s_.threads, [&](i64 t) {
      const Range mine = part(0, rows.size(), t, s_.threads);
      T* out = u_q_ + (rows.begin + mine.begin) * d;
      const i64 count = mine.size() * d;
      if (!s_.self || rows.begin == 0)
        std::fill_n(out, count, T(0));
      for (i64 other = 0; other < s_.threads; ++other) {
        if (!started_[other])
          continue;
        s_.tile.add(out, count, parts_ + (other * s_.panel_rows + mine.begin) * d, count, 1, count);
      }
    });
    std::fill(started_.begin(), started_.end(), false);
  }

 private:
  // BLAS through the dispatcher cannot accumulate, so all but the first product go through scratch.
  void accumulate(i64 t, T* out, i64 rows, bool more, const View<T>& a, const View<T>& b) {
    const i64 d = s_.d;
    T* scratch = product_ + t * std::max(s_.panel_rows, s_.tile_cols) * d;
    multiply<T>({more ? scratch : out, rows, d, d, 1}, a, b);
    if (more)
      s_.tile.add(out, rows * d, scratch, rows * d, 1, rows * d);
  }

  const Sweep<T>& s_;
  T *u_q_, *u_k_;
  Buffer<T> parts_, product_;
  std::vector<char> started_;
};

// u *= scale, and sum_i <x_i, u_i> before that: with u = W k the gradient of the scale, which is never divided by.
template <typename T>
double finish(const Operand<T>& x, T scale, T* u, bool want_dot) {
  const i64 d = x.cols, threads = useful_threads(64.0 * x.rows * d);
  std::vector<double> sums(threads, 0.0);
  run(threads, [&](i64 t) {
    const Range mine = part(0, x.rows, t, threads);
    Buffer<T> scratch(d);
    for (i64 i = mine.begin; i < mine.end; ++i) {
      if (want_dot) {
        i64 ld;
        const T* row = x.fetch(i, 1, scratch, &ld);
        sums[t] += tiles<T>().dot(row, u + i * d, d);
      }
      tiles<T>().scale_rows(u + i * d, d, u + i * d, d, &scale, 1, d);
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace sslkernels
