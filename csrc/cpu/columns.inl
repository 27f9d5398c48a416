// SPDX-License-Identifier: Apache-2.0
// Mean and variance of columns. Included once for each instruction set, by the leaves of a family that needs it.

constexpr i64 kBlock = 16;  // rows that are summed in T before they join a sum in double

// sums_j += sum over `count` rows of x_j - mean_j, squares_j likewise of its square
template <i64 count, typename T>
INLINE void add_sums(const T* x, i64 ld, i64 cols, const T* mean, double* sums, double* squares) {
#pragma omp simd
  for (i64 j = 0; j < cols; ++j) {
    T sum = 0, square = 0;
    for (i64 i = 0; i < count; ++i) {
      const T c = x[i * ld + j] - mean[j];
      sum += c;
      square += c * c;
    }
    sums[j] += sum;
    squares[j] += square;
  }
}

// rest_j = mean over the rows of x_j - mean_j, variance_j that of x_j. False where they may have cancelled.
template <typename T>
INLINE bool column_moments(const T* x, i64 ld, i64 rows, i64 cols, const T* mean, double* rest, double* variance) {
  std::fill_n(rest, cols, 0.0);
  std::fill_n(variance, cols, 0.0);
  i64 i = 0;
  for (; i + kBlock <= rows; i += kBlock) add_sums<kBlock>(x + i * ld, ld, cols, mean, rest, variance);
  for (; i < rows; ++i) add_sums<1>(x + i * ld, ld, cols, mean, rest, variance);
  bool good = true;
  for (i64 j = 0; j < cols; ++j) {
    rest[j] /= rows;
    variance[j] = variance[j] / rows - rest[j] * rest[j];
    variance[j] = variance[j] < 0 ? 0 : variance[j];
    good &= rest[j] * rest[j] <= 4 * variance[j];
  }
  return good;
}

// mean_j + rest_j, the mean rounded and what is left of it, and the variance of column j over `rows`
template <typename T>
INLINE void column_statistics(const T* x, i64 ld, i64 rows, i64 cols, T* mean, double* rest, double* variance) {
  // a few rows tell about where the mean is; where they are far from it, their variance has cancelled
  const i64 few = rows < kBlock ? rows : kBlock;
  std::fill_n(mean, cols, T(0));
  column_moments(x, ld, few, cols, mean, rest, variance);
  for (i64 j = 0; j < cols; ++j) mean[j] = static_cast<T>(rest[j]);
  if (!column_moments(x, ld, rows, cols, mean, rest, variance)) {
    for (i64 j = 0; j < cols; ++j) mean[j] += static_cast<T>(rest[j]);
    column_moments(x, ld, rows, cols, mean, rest, variance);
  }
}
