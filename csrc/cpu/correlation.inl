// SPDX-License-Identifier: Apache-2.0
// Loops of the correlation kernels over strips of columns and over blocks of products; what each does is said in
// correlation.h. Included once for each instruction set.
#include "cpu/columns.inl"

template <typename T>
LEAF void measure(const View<T>& x, double eps, double degrees, const Moments<T>& m, double* scratch) {
  double *rest = scratch, *variance = scratch + x.cols;
  column_statistics(x.data, x.row_stride, x.rows, x.cols, m.mean, rest, variance);
  for (i64 j = 0; j < x.cols; ++j) {
    m.rest[j] = static_cast<T>(rest[j]);
    m.inverse[j] = static_cast<T>(1 / std::sqrt(variance[j] * x.rows / degrees + eps));
  }
}

template <typename T>
LEAF void center(const View<T>& x, const Moments<T>& m, bool scale, T* out, i64 ld) {
  const T *mean = m.mean, *rest = m.rest, *inverse = m.inverse;
  for (i64 i = 0; i < x.rows; ++i) {
    const T* row = x.data + i * x.row_stride;
    T* o = out + i * ld;
    if (scale) {
#pragma omp simd
      for (i64 j = 0; j < x.cols; ++j) o[j] = ((row[j] - mean[j]) - rest[j]) * inverse[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < x.cols; ++j) o[j] = (row[j] - mean[j]) - rest[j];
    }
  }
}

// sums_j += sum over `count` rows of a_j, dots_j likewise of a_j b_j; sums may be null
template <i64 count, typename T>
INLINE void add_dots(const T* a, i64 lda, const T* b, i64 ldb, i64 cols, double* sums, double* dots) {
#pragma omp simd
  for (i64 j = 0; j < cols; ++j) {
    T sum = 0, dot = 0;
    for (i64 i = 0; i < count; ++i) {
      sum += a[i * lda + j];
      dot += a[i * lda + j] * b[i * ldb + j];
    }
    if (sums)
      sums[j] += sum;
    dots[j] += dot;
  }
}

template <typename T>
LEAF void column_dots(const View<T>& a, const View<T>& b, double* sums, double* dots) {
  if (sums)
    std::fill_n(sums, a.cols, 0.0);
  std::fill_n(dots, a.cols, 0.0);
  const i64 lda = a.row_stride, ldb = b.row_stride;
  i64 i = 0;
  for (; i + kBlock <= a.rows; i += kBlock)
    add_dots<kBlock>(a.data + i * lda, lda, b.data + i * ldb, ldb, a.cols, sums, dots);
  for (; i < a.rows; ++i) add_dots<1>(a.data + i * lda, lda, b.data + i * ldb, ldb, a.cols, sums, dots);
}

template <typename T>
LEAF void blend(const View<T>& g, T factor, const View<T>& other, const T* own, T* out, i64 ld) {
  for (i64 i = 0; i < g.rows; ++i) {
    const T *grad = g.data + i * g.row_stride, *o = other.data + i * other.row_stride;
    T* row = out + i * ld;
    if (own) {
#pragma omp simd
      for (i64 j = 0; j < g.cols; ++j) row[j] = factor * grad[j] + own[j] * o[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < g.cols; ++j) row[j] = factor * grad[j];
    }
  }
}

template <typename T>
LEAF void blend_standardized(const View<T>& g, T factor, const View<T>& other, const T* own, const View<T>& z,
                             const T* mean, const T* along, const T* inverse, T* out, i64 ld) {
  for (i64 i = 0; i < g.rows; ++i) {
    const T *grad = g.data + i * g.row_stride, *o = other.data + i * other.row_stride;
    const T* unit = z.data + i * z.row_stride;
    T* row = out + i * ld;
    if (own) {
#pragma omp simd
      for (i64 j = 0; j < g.cols; ++j)
        row[j] = (((factor * grad[j] + own[j] * o[j]) - mean[j]) - unit[j] * along[j]) * inverse[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < g.cols; ++j) row[j] = ((factor * grad[j] - mean[j]) - unit[j] * along[j]) * inverse[j];
    }
  }
}

template <typename T>
LEAF void blend_difference(const View<T>& g, T factor, const View<T>& other, const T* own, const View<T>& x,
                           const View<T>& y, T difference, T* out, i64 ld) {
  for (i64 i = 0; i < g.rows; ++i) {
    const T *grad = g.data + i * g.row_stride, *o = other.data + i * other.row_stride;
    const T *a = x.data + i * x.row_stride, *b = y.data + i * y.row_stride;
    T* row = out + i * ld;
    if (own) {
#pragma omp simd
      for (i64 j = 0; j < g.cols; ++j) row[j] = factor * grad[j] + own[j] * o[j] + difference * (a[j] - b[j]);
    } else {
#pragma omp simd
      for (i64 j = 0; j < g.cols; ++j) row[j] = factor * grad[j] + difference * (a[j] - b[j]);
    }
  }
}

template <typename T>
LEAF double squared_distance(const View<T>& x, const View<T>& y) {
  double total = 0;
  for (i64 i = 0; i < x.rows; ++i) {
    const T *a = x.data + i * x.row_stride, *b = y.data + i * y.row_stride;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < x.cols; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
    total += sum;
  }
  return total;
}

template <typename T>
LEAF double inner(const View<T>& a, const View<T>& b) {
  double total = 0;
  for (i64 i = 0; i < a.rows; ++i) {
    const T *p = a.data + i * a.row_stride, *q = b.data + i * b.row_stride;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < a.cols; ++j) sum += static_cast<double>(p[j]) * q[j];
    total += sum;
  }
  return total;
}

template <typename T>
LEAF void transpose(const View<T>& x, T* out, i64 ld) {
  for (i64 i = 0; i < x.rows; i += kBlock) {
    const i64 end = i + kBlock < x.rows ? i + kBlock : x.rows;
    for (i64 j = 0; j < x.cols; ++j) {
      T* o = out + j * ld;
      for (i64 k = i; k < end; ++k) o[k] = x.data[k * x.row_stride + j];
    }
  }
}

template <typename T>
LEAF double weigh(T* c, i64 ld, i64 rows, i64 cols, i64 first, const T* diagonal, T factor) {
  double total = 0;
  for (i64 i = 0; i < rows; ++i) {
    T* row = c + i * ld;
    const i64 own = first + i;
    const bool here = diagonal && own >= 0 && own < cols;
    if (here)
      row[own] = 0;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) {
      sum += row[j] * row[j];
      row[j] *= factor;
    }
    if (here)
      row[own] = diagonal[own];
    total += sum;
  }
  return total;
}
