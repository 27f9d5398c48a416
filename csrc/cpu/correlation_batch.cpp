// SPDX-License-Identifier: Apache-2.0
// The columns of one view: their moments, their treatment, and the way back.
#include "cpu/correlation.h"

#define SSLKERNELS_LEAVES "cpu/correlation.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

template <typename T>
void Strips<T>::measure(const T* x, i64 ld, i64 rows, i64 cols, double eps, double degrees, const Moments<T>& m,
                        double* scratch) {
  SSLKERNELS_AT_LEVEL(measure(x, ld, rows, cols, eps, degrees, m, scratch));
}

template <typename T>
void Strips<T>::center(const T* x, i64 ld, i64 rows, i64 cols, const Moments<T>& m, bool scale, T* out, i64 ldo) {
  SSLKERNELS_AT_LEVEL(center(x, ld, rows, cols, m, scale, out, ldo));
}

template <typename T>
void Strips<T>::column_dots(const T* a, i64 lda, const T* b, i64 ldb, i64 rows, i64 cols, double* sums, double* dots) {
  SSLKERNELS_AT_LEVEL(column_dots(a, lda, b, ldb, rows, cols, sums, dots));
}

template <typename T>
void Strips<T>::combine(T* g, i64 ldg, const T* other, i64 ldo, i64 rows, i64 cols, T factor, const T* diagonal) {
  SSLKERNELS_AT_LEVEL(combine(g, ldg, other, ldo, rows, cols, factor, diagonal));
}

template <typename T>
void Strips<T>::through_standard(const T* g, i64 ldg, const T* z, i64 ldz, i64 rows, i64 cols, const T* mean,
                                 const T* along, const T* inverse, T* out, i64 ldo) {
  SSLKERNELS_AT_LEVEL(through_standard(g, ldg, z, ldz, rows, cols, mean, along, inverse, out, ldo));
}

template <typename T>
double Strips<T>::squared_distance(const T* x, i64 ldx, const T* y, i64 ldy, i64 rows, i64 cols) {
  return SSLKERNELS_AT_LEVEL(squared_distance(x, ldx, y, ldy, rows, cols));
}

template <typename T>
void Strips<T>::add_difference(T* out, i64 ldo, const T* x, i64 ldx, const T* y, i64 ldy, i64 rows, i64 cols,
                               T factor) {
  SSLKERNELS_AT_LEVEL(add_difference(out, ldo, x, ldx, y, ldy, rows, cols, factor));
}

template <typename T>
double Strips<T>::inner(const T* a, i64 lda, const T* b, i64 ldb, i64 rows, i64 cols) {
  return SSLKERNELS_AT_LEVEL(inner(a, lda, b, ldb, rows, cols));
}

template <typename T>
void Strips<T>::transpose(const T* x, i64 ld, i64 rows, i64 cols, T* out, i64 ldo) {
  SSLKERNELS_AT_LEVEL(transpose(x, ld, rows, cols, out, ldo));
}

template <typename T>
double Strips<T>::weigh(T* c, i64 ld, i64 rows, i64 cols, i64 first, const T* diagonal, T factor) {
  return SSLKERNELS_AT_LEVEL(weigh(c, ld, rows, cols, first, diagonal, factor));
}

template <typename T>
Batch<T>::Batch(const Tensor& x, Columns treatment, double eps, bool unbiased)
    : tensor_(x),
      data_(static_cast<const char*>(x.const_data_ptr())),
      rows(x.size(0)),
      cols(x.size(1)),
      treatment(treatment),
      row_stride_(x.stride(0)),
      col_stride_(x.stride(1)),
      bytes_(static_cast<i64>(x.element_size())),
      dtype_(kind(x)),
      direct_(x.scalar_type() == kScalar<T> && (col_stride_ == 1 || cols == 1) && row_stride_ >= cols),
      eps_(eps),
      degrees_(static_cast<double>(unbiased ? rows - 1 : rows)),
      moments_(empty({3, treatment == Columns::kRaw ? 0 : cols}, kScalar<T>)),
      variance_(treatment == Columns::kRaw ? 0 : cols) {}

template <typename T>
Batch<T>::Batch(const Tensor& x, const Tensor& moments, bool unbiased) : Batch(x, Columns::kStandardized, 0, unbiased) {
  moments_ = moments;
}

template <typename T>
Moments<T> Batch<T>::moments(Range cols_) const {
  T* first = data<T>(moments_) + cols_.begin;
  return {first, first + cols, first + 2 * cols, variance_ + cols_.begin};
}

template <typename T>
void Batch<T>::load(Range cols_, T* out) const {
  const char* at = data_ + cols_.begin * col_stride_ * bytes_;
  tiles<T>().load(at, dtype_, row_stride_, col_stride_, out, rows, cols_.size(), T(1));
}

template <typename T>
View<T> Batch<T>::raw(Range rows_, Range cols_, T* room, i64 ld) const {
  const char* at = data_ + (rows_.begin * row_stride_ + cols_.begin * col_stride_) * bytes_;
  if (direct_)
    return {reinterpret_cast<const T*>(at), rows_.size(), cols_.size(), row_stride_, 1};
  const i64 step = ld == cols_.size() ? std::max<i64>(rows_.size(), 1) : 1;  // load() writes dense rows
  for (i64 i = 0; i < rows_.size(); i += step) {
    tiles<T>().load(at + i * row_stride_ * bytes_, dtype_, row_stride_, col_stride_, room + i * ld, step, cols_.size(),
                    T(1));
  }
  return {room, rows_.size(), cols_.size(), ld, 1};
}

template <typename T>
View<T> Batch<T>::columns(Range cols_, T* room, i64 ld, bool measure) const {
  const View<T> x = raw({0, rows}, cols_, room, ld);
  if (treatment == Columns::kRaw)
    return x;
  const Moments<T> m = moments(cols_);
  if (measure) {
    std::vector<double> scratch(2 * cols_.size());
    Strips<T>::measure(x.data, x.row_stride, rows, cols_.size(), eps_, degrees_, m, scratch.data());
  }
  Strips<T>::center(x.data, x.row_stride, rows, cols_.size(), m, treatment == Columns::kStandardized, room, ld);
  return {room, rows, cols_.size(), ld, 1};
}

template <typename T>
void Batch<T>::backward(Range cols_, T* g, i64 ld, const View<T>& z) const {
  if (treatment != Columns::kStandardized)
    return;  // the gradient of a centred column that comes from products with centred columns is centred
  const i64 n = cols_.size();
  std::vector<double> scratch(2 * n);
  std::vector<T> means(2 * n);
  double *sums = scratch.data(), *dots = sums + n;
  Strips<T>::column_dots(g, ld, z.data, z.row_stride, rows, n, sums, dots);
  for (i64 j = 0; j < n; ++j) {
    means[j] = static_cast<T>(sums[j] / rows);
    means[n + j] = static_cast<T>(dots[j] / degrees_);
  }
  Strips<T>::through_standard(g, ld, z.data, z.row_stride, rows, n, means.data(), means.data() + n,
                              moments(cols_).inverse, g, ld);
}

template struct Strips<float>;
template struct Strips<double>;
template class Batch<float>;
template class Batch<double>;

}  // namespace sslkernels
