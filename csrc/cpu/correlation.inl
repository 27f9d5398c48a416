// SPDX-License-Identifier: Apache-2.0
// Loops of the correlation kernels over strips of columns and over blocks of products; what each does is said in
// correlation.h. Included once for each instruction set.
#include "cpu/columns.inl"

template <typename T>
LEAF void measure(const T* x, i64 ld, i64 rows, i64 cols, double eps, double degrees, const Moments<T>& m,
                  double* scratch) {
  double *rest = scratch, *variance = scratch + cols;
  column_statistics(x, ld, rows, cols, m.mean, rest, variance);
  for (i64 j = 0; j < cols; ++j) {
    m.rest[j] = static_cast<T>(rest[j]);
    m.variance[j] = variance[j] * rows / degrees;
    m.inverse[j] = static_cast<T>(1 / std::sqrt(m.variance[j] + eps));
  }
}

template <typename T>
LEAF void center(const T* x, i64 ld, i64 rows, i64 cols, const Moments<T>& m, bool scale, T* out, i64 ldo) {
  const T *mean = m.mean, *rest = m.rest, *inverse = m.inverse;
  for (i64 i = 0; i < rows; ++i) {
    const T* row = x + i * ld;
    T* o = out + i * ldo;
    if (scale) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) o[j] = ((row[j] - mean[j]) - rest[j]) * inverse[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) o[j] = (row[j] - mean[j]) - rest[j];
    }
  }
}

// sums_j += sum over `count` rows of a_j, dots_j likewise of a_j b_j
template <i64 count, typename T>
INLINE void add_dots(const T* a, i64 lda, const T* b, i64 ldb, i64 cols, double* sums, double* dots) {
#pragma omp simd
  for (i64 j = 0; j < cols; ++j) {
    T sum = 0, dot = 0;
    for (i64 i = 0; i < count; ++i) {
      sum += a[i * lda + j];
      dot += a[i * lda + j] * b[i * ldb + j];
    }
    sums[j] += sum;
    dots[j] += dot;
  }
}

template <typename T>
LEAF void column_dots(const T* a, i64 lda, const T* b, i64 ldb, i64 rows, i64 cols, double* sums, double* dots) {
  std::fill_n(sums, cols, 0.0);
  std::fill_n(dots, cols, 0.0);
  i64 i = 0;
  for (; i + kBlock <= rows; i += kBlock) add_dots<kBlock>(a + i * lda, lda, b + i * ldb, ldb, cols, sums, dots);
  for (; i < rows; ++i) add_dots<1>(a + i * lda, lda, b + i * ldb, ldb, cols, sums, dots);
}

template <typename T>
LEAF void combine(T* g, i64 ldg, const T* other, i64 ldo, i64 rows, i64 cols, T factor, const T* diagonal) {
  for (i64 i = 0; i < rows; ++i) {
    T* row = g + i * ldg;
    const T* o = other + i * ldo;
    if (diagonal) {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) row[j] = factor * row[j] + diagonal[j] * o[j];
    } else {
#pragma omp simd
      for (i64 j = 0; j < cols; ++j) row[j] *= factor;
    }
  }
}

template <typename T>
LEAF void through_standard(const T* g, i64 ldg, const T* z, i64 ldz, i64 rows, i64 cols, const T* mean, const T* along,
                           const T* inverse, T* out, i64 ldo) {
  for (i64 i = 0; i < rows; ++i) {
    const T *grad = g + i * ldg, *unit = z + i * ldz;
    T* o = out + i * ldo;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) o[j] = ((grad[j] - mean[j]) - unit[j] * along[j]) * inverse[j];
  }
}

template <typename T>
LEAF double squared_distance(const T* x, i64 ldx, const T* y, i64 ldy, i64 rows, i64 cols) {
  double total = 0;
  for (i64 i = 0; i < rows; ++i) {
    const T *a = x + i * ldx, *b = y + i * ldy;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
    total += sum;
  }
  return total;
}

template <typename T>
LEAF void add_difference(T* out, i64 ldo, const T* x, i64 ldx, const T* y, i64 ldy, i64 rows, i64 cols, T factor) {
  for (i64 i = 0; i < rows; ++i) {
    const T *a = x + i * ldx, *b = y + i * ldy;
    T* o = out + i * ldo;
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) o[j] += factor * (a[j] - b[j]);
  }
}

template <typename T>
LEAF double inner(const T* a, i64 lda, const T* b, i64 ldb, i64 rows, i64 cols) {
  double total = 0;
  for (i64 i = 0; i < rows; ++i) {
    const T *p = a + i * lda, *q = b + i * ldb;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < cols; ++j) sum += static_cast<double>(p[j]) * q[j];
    total += sum;
  }
  return total;
}

template <typename T>
LEAF void transpose(const T* x, i64 ld, i64 rows, i64 cols, T* out, i64 ldo) {
  for (i64 i = 0; i < rows; i += kBlock) {
    const i64 end = i + kBlock < rows ? i + kBlock : rows;
    for (i64 j = 0; j < cols; ++j) {
      T* o = out + j * ldo;
      for (i64 k = i; k < end; ++k) o[k] = x[k * ld + j];
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
