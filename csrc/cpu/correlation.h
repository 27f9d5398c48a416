// SPDX-License-Identifier: Apache-2.0
// Products over the batch, C = a^T b or a^T a of each view, where only norms of C and their gradients are wanted. What
// the ops compute is defined in sslkernels/reference/correlation.py.
#pragma once

#include "cpu/operand.h"

namespace sslkernels {

// Of each column: mean + rest is the mean, rounded and what is left of it; inverse is 1 / sqrt(variance + eps).
template <typename T>
struct Moments {
  T *mean, *rest, *inverse;
};

// The leaves of correlation.inl. Views are (rows, cols), dense along a row; results of that form have row stride ld.
template <typename T>
struct Strips {
  // the moments of each column, its variance over `degrees`; scratch: 2 cols
  static void measure(const View<T>& x, double eps, double degrees, const Moments<T>& m, double* scratch);
  // out = x - mean, times inverse to scale; in place too
  static void center(const View<T>& x, const Moments<T>& m, bool scale, T* out, i64 ld);
  // sums_j = sum_i a_ij, dots_j = sum_i a_ij b_ij; sums may be null
  static void column_dots(const View<T>& a, const View<T>& b, double* sums, double* dots);
  // out = factor g + own_j other; the second term only where own is not null
  static void blend(const View<T>& g, T factor, const View<T>& other, const T* own, T* out, i64 ld);
  // out = (factor g + own_j other - mean_j - along_j z) inverse_j
  static void blend_standardized(const View<T>& g, T factor, const View<T>& other, const T* own, const View<T>& z,
                                 const T* mean, const T* along, const T* inverse, T* out, i64 ld);
  // out = factor g + own_j other + difference (x - y)
  static void blend_difference(const View<T>& g, T factor, const View<T>& other, const T* own, const View<T>& x,
                               const View<T>& y, T difference, T* out, i64 ld);
  // sum (x - y)^2
  static double squared_distance(const View<T>& x, const View<T>& y);
  // sum a b
  static double inner(const View<T>& a, const View<T>& b);
  // out = x^T
  static void transpose(const View<T>& x, T* out, i64 ld);
  // sum c^2, then c *= factor. Where diagonal is given it replaces c_ij with j = first + i, which are not counted.
  static double weigh(T* c, i64 ld, i64 rows, i64 cols, i64 first, const T* diagonal, T factor);
};

// Columns that several passes find in the cache
template <typename T>
i64 strip_cols(i64 rows) {
  constexpr i64 kBytes = i64(1) << 20;
  return std::clamp<i64>(kBytes / std::max<i64>(1, rows * i64(sizeof(T))) / 16 * 16, 16, 256);
}

enum class Columns { kRaw, kCentered, kStandardized };

// The features of one view, (N, D) of any dtype and strides, and what is done to their columns.
template <typename T>
class Batch {
 public:
  explicit Batch(const Tensor& x, Columns treatment = Columns::kRaw, double eps = 0, bool unbiased = true);

  // With the moments that another found.
  Batch(const Tensor& x, const Tensor& moments, bool unbiased);

  // Whether columns() gives a part of the view itself.
  bool in_place() const { return direct_ && treatment == Columns::kRaw; }

  // Some columns after their treatment, where they lie or in `room`; `measure` finds their moments first.
  View<T> columns(Range cols, T* room, i64 ld, bool measure) const;

  // Some columns before it, in `out`, (N, cols) dense.
  void load(Range cols, T* out) const;

  // Some elements before it, where they lie or in `room`.
  View<T> raw(Range rows, Range cols, T* room, i64 ld) const;

  // The gradient of the view's columns, where that of z = columns(cols) is factor g + own_j other and <other, z> is
  // dots_j; own may be null.
  void backward(Range cols, const View<T>& g, T factor, const View<T>& other, const T* own, const double* dots,
                const View<T>& z, T* out, i64 ld) const;

  const Tensor& moments() const { return moments_; }

 private:
  Moments<T> moments(Range cols) const;

  Tensor tensor_;
  const char* data_;

 public:
  const i64 rows, cols;
  const Columns treatment;

 private:
  i64 row_stride_, col_stride_, bytes_;
  Dtype dtype_;
  bool direct_;
  double eps_, degrees_;
  Tensor moments_;  // (3, D): mean, rest, inverse
};

// The N x N matrices K = Z Z^T of one or two views, from panels of their columns. Half of the tiles are computed.
template <typename T>
class Grams {
 public:
  Grams(i64 views, i64 rows, i64 threads);
  void add(const std::vector<View<T>>& panels);
  // Makes them whole; nothing can be added from then on.
  void close();
  // <K_v, K_w>
  double inner(i64 v, i64 w) const;
  View<T> operator[](i64 v) const { return {k_ + v * size_, rows_, rows_, ld_, 1}; }

 private:
  T* part(i64 p, i64 v) const { return k_ + (p * views_ + v) * size_; }

  i64 views_, rows_, ld_, size_, tile_, blocks_, threads_, parts_;
  bool empty_ = true;
  Buffer<T> k_, products_;
};

// What a value that is made of C and of the views gives back to them.
template <typename T>
struct Slopes {
  T product;                             // to an entry of C this multiple of it
  std::vector<std::vector<T>> diagonal;  // to the diagonal, of each side, these; none for the whole norm
  T difference;                          // to the first view this multiple of (x - y), to the second the negative
};

// C = a^T b of two sides, or C = a^T a of each side, for its norm and the gradients of that. The columns are read once
// here and once for the gradients. What is kept is N x N in Gram space; else the treated columns, and panels of C.
template <typename T>
class Product {
 public:
  // whole: the norm is of all of C, else of what is not on its diagonal. distance: sum (x - y)^2 is found as well.
  // Gradients of the sides go into what is not null of `out`, (N, D) dense.
  Product(std::vector<Batch<T>> sides, bool cross, bool whole, bool distance, std::vector<T*> out);

  // C_jj of a side; not found for the whole norm.
  double diagonal(i64 v, i64 j) const { return diagonal_[cross_ ? 0 : v][j]; }
  double distance() const;
  const Batch<T>& side(i64 v) const { return sides_[v]; }

  // The squared norm, summed over the sides, and the gradients. Once.
  double norm(const Slopes<T>& slopes) const;

 private:
  i64 views() const { return static_cast<i64>(sides_.size()); }
  i64 partner(i64 v) const { return cross_ ? 1 - v : v; }
  Range clip(i64 v, Range cols) const;
  View<T> columns(i64 v, Range cols, T* room, i64 ld, bool measure) const;
  void examine(Range cols, const std::vector<View<T>>& z, double* distance);
  template <typename F>
  void in_pairs(Range cols, const F& f) const;
  void finish(i64 v, Range cols, const View<T>& g, bool complete, const View<T>& z, const View<T>& other,
              const Slopes<T>& slopes) const;
  void measure_grams();
  void gram_gradients(const Slopes<T>& slopes) const;
  void treat_features(bool measure);
  double feature_product(i64 left, i64 right, const Slopes<T>& slopes) const;

  std::vector<Batch<T>> sides_;
  bool cross_, whole_, with_distance_;
  std::vector<T*> out_;
  i64 rows_, wide_, threads_;
  std::vector<std::vector<double>> diagonal_;
  std::vector<double> distances_;  // of each thread
  double norm_ = 0;
  std::optional<Grams<T>> grams_;
  std::vector<Buffer<T>> copies_;
  std::vector<View<T>> treated_;  // in feature space
};

}  // namespace sslkernels
