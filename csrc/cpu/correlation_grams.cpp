// SPDX-License-Identifier: Apache-2.0
// N x N matrices Z Z^T from panels of columns.
#include "cpu/correlation.h"

namespace sslkernels {

namespace {

i64 tile_rows(i64 rows) { return rows >= 1024 ? 256 : 128; }

i64 blocks(i64 rows) { return (rows + tile_rows(rows) - 1) / tile_rows(rows); }

// Where there are too few tiles to share among the threads, each thread has some of the columns and matrices of its
// own.
i64 parts(i64 views, i64 rows, i64 threads) {
  constexpr i64 kBytes = i64(16) << 20;
  const i64 b = blocks(rows), tiles = views * b * (b + 1) / 2;
  if (tiles >= 4 * threads)
    return 1;
  return std::clamp<i64>(kBytes / std::max<i64>(1, views * rows * rows * 4), 1, threads);
}

}  // namespace

template <typename T>
Grams<T>::Grams(i64 views, i64 rows, i64 threads)
    : views_(views),
      rows_(rows),
      ld_(rows + 16),  // rows a power of two apart would share few sets of the cache
      size_(rows * ld_),
      tile_(tile_rows(rows)),
      blocks_(blocks(rows)),
      threads_(threads),
      parts_(parts(views, rows, threads)),
      k_(parts_ * views * size_),
      products_(threads * tile_ * rows) {}

template <typename T>
void Grams<T>::add(const std::vector<View<T>>& panels) {
  // tiles on and below the diagonal, one row of them after the other, in each view, in each part of the columns
  const i64 triangle = blocks_ * (blocks_ + 1) / 2, items = parts_ * views_ * triangle;
  run(threads_, [&](i64 t) {
    i64 item = items * t / threads_;
    const i64 end = items * (t + 1) / threads_;
    while (item < end) {
      const i64 v = item / triangle % views_, p = item / triangle / views_;
      i64 row = 0, col = item % triangle;
      for (; col > row; ++row) col -= row + 1;
      const i64 count = std::min(end - item, row + 1 - col);  // tiles of one row are one product
      const Range of{row * tile_, std::min(rows_, (row + 1) * tile_)};
      const Range by{col * tile_, std::min(rows_, (col + count) * tile_)};
      const View<T>& z = panels[v];
      const Range cols = sslkernels::part(0, z.cols, p, parts_);
      const View<T> left{z.data + of.begin * z.row_stride + cols.begin, of.size(), cols.size(), z.row_stride, 1};
      const View<T> right{z.data + by.begin * z.row_stride + cols.begin, by.size(), cols.size(), z.row_stride, 1};
      T* out = part(p, v) + of.begin * ld_ + by.begin;
      if (empty_) {
        multiply<T>({out, of.size(), by.size(), ld_, 1}, left, right.transposed());
      } else if (cols.size()) {
        T* product = products_ + t * tile_ * rows_;
        multiply<T>({product, of.size(), by.size(), by.size(), 1}, left, right.transposed());
        tiles<T>().add(out, ld_, product, by.size(), of.size(), by.size());
      }
      item += count;
    }
  });
  empty_ = false;
}

template <typename T>
void Grams<T>::close() {
  run(std::min(threads_, blocks_ * views_), [&](i64 t) {
    const i64 count = std::min(threads_, blocks_ * views_);
    for (i64 item = t; item < blocks_ * views_; item += count) {
      const i64 v = item % views_;
      const Range of{item / views_ * tile_, std::min(rows_, (item / views_ + 1) * tile_)};
      T* row = part(0, v) + of.begin * ld_;
      for (i64 p = 1; p < parts_; ++p) {
        tiles<T>().add(row, ld_, part(p, v) + of.begin * ld_, ld_, of.size(), of.end);
      }
      Strips<T>::transpose({row, of.size(), of.begin, ld_, 1}, part(0, v) + of.begin, ld_);
    }
  });
}

template <typename T>
double Grams<T>::inner(i64 v, i64 w) const {
  std::vector<double> sums(blocks_);
  const i64 count = std::min(threads_, blocks_);
  run(count, [&](i64 t) {
    for (i64 b = t; b < blocks_; b += count) {
      const i64 first = b * tile_, rows = std::min(tile_, rows_ - first);
      const T *left = part(0, v) + first * ld_, *right = part(0, w) + first * ld_;
      // what lies left of the diagonal's tile counts for what lies above it
      sums[b] = 2 * Strips<T>::inner({left, rows, first, ld_, 1}, {right, rows, first, ld_, 1}) +
                Strips<T>::inner({left + first, rows, rows, ld_, 1}, {right + first, rows, rows, ld_, 1});
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

template class Grams<float>;
template class Grams<double>;

}  // namespace sslkernels
