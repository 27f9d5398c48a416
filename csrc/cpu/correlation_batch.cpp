// SPDX-License-Identifier: Apache-2.0
// The columns of one view: their moments, their treatment, and the way back.
#include "cpu/correlation.h"

#define SSLKERNELS_LEAVES "cpu/correlation.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

template <typename T>
void Strips<T>::measure(const View<T>& x, double eps, double degrees, const Moments<T>& m, double* scratch) {
  SSLKERNELS_AT_LEVEL(measure(x, eps, degrees, m, scratch));
}

template <typename T>
void Strips<T>::center(const View<T>& x, const Moments<T>& m, bool scale, T* out, i64 ld) {
  SSLKERNELS_AT_LEVEL(center(x, m, scale, out, ld));
}

template <typename T>
void Strips<T>::column_dots(const View<T>& a, const View<T>& b, double* sums, double* dots) {
  SSLKERNELS_AT_LEVEL(column_dots(a, b, sums, dots));
}

template <typename T>
void Strips<T>::blend(const View<T>& g, T factor, const View<T>& other, const T* own, T* out, i64 ld) {
  SSLKERNELS_AT_LEVEL(blend(g, factor, other, own, out, ld));
}

template <typename T>
void Strips<T>::blend_standardized(const View<T>& g, T factor, const View<T>& other, const T* own, const View<T>& z,
                                   const T* mean, const T* along, const T* inverse, T* out, i64 ld) {
  SSLKERNELS_AT_LEVEL(blend_standardized(g, factor, other, own, z, mean, along, inverse, out, ld));
}

template <typename T>
void Strips<T>::blend_difference(const View<T>& g, T factor, const View<T>& other, const T* own, const View<T>& x,
                                 const View<T>& y, T difference, T* out, i64 ld) {
  SSLKERNELS_AT_LEVEL(blend_difference(g, factor, other, own, x, y, difference, out, ld));
}

template <typename T>
double Strips<T>::squared_distance(const View<T>& x, const View<T>& y) {
  return SSLKERNELS_AT_LEVEL(squared_distance(x, y));
}

template <typename T>
double Strips<T>::inner(const View<T>& a, const View<T>& b) {
  return SSLKERNELS_AT_LEVEL(inner(a, b));
}

template <typename T>
void Strips<T>::transpose(const View<T>& x, T* out, i64 ld) {
  SSLKERNELS_AT_LEVEL(transpose(x, out, ld));
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
      moments_(empty({3, treatment == Columns::kRaw ? 0 : cols}, kScalar<T>)) {}

template <typename T>
Batch<T>::Batch(const Tensor& x, const Tensor& moments, bool unbiased) : Batch(x, Columns::kStandardized, 0, unbiased) {
  moments_ = moments;
}

template <typename T>
Moments<T> Batch<T>::moments(Range cols_) const {
  T* first = data<T>(moments_) + cols_.begin;
  return {first, first + cols, first + 2 * cols};
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
  const i64 n = cols_.size();
  View<T> x = raw({0, rows}, cols_, room, ld);
  if (treatment == Columns::kRaw)
    return x;
  const Moments<T> m = moments(cols_);
  if (measure) {
    if (x.data != room) {
      // several passes: rows that lie a power of two apart would share few sets of the cache
      for (i64 i = 0; i < rows; ++i) std::copy_n(x.data + i * x.row_stride, n, room + i * ld);
      x = {room, rows, n, ld, 1};
    }
    std::vector<double> scratch(2 * n);
    Strips<T>::measure(x, eps_, degrees_, m, scratch.data());
  }
  Strips<T>::center(x, m, treatment == Columns::kStandardized, room, ld);
  return {room, rows, n, ld, 1};
}

template <typename T>
void Batch<T>::backward(Range cols_, const View<T>& g, T factor, const View<T>& other, const T* own, const double* dots,
                        const View<T>& z, T* out, i64 ld) const {
  // what comes to centred columns from products with centred columns is centred already
  if (treatment != Columns::kStandardized)
    return Strips<T>::blend(g, factor, other, own, out, ld);
  const i64 n = cols_.size();
  std::vector<double> sums(2 * n);
  std::vector<T> means(2 * n);
  Strips<T>::column_dots(g, z, sums.data(), &sums[n]);
  for (i64 j = 0; j < n; ++j) {
    means[j] = static_cast<T>(factor * sums[j] / rows);
    means[n + j] = static_cast<T>((factor * sums[n + j] + (own ? own[j] * dots[j] : 0)) / degrees_);
  }
  Strips<T>::blend_standardized(g, factor, other, own, z, means.data(), &means[n], moments(cols_).inverse, out, ld);
}

template struct Strips<float>;
template struct Strips<double>;
template class Batch<float>;
template class Batch<double>;

}  // namespace sslkernels
