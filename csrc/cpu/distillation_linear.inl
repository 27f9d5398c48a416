// SPDX-License-Identifier: Apache-2.0
// Included once for each instruction set.

template <typename T>
LEAF double wide_dot(const T* a, const double* b, i64 n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += static_cast<double>(a[j]) * b[j];
  return sum;
}

template <typename T>
LEAF void add_to(double* sum, const T* x, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) sum[j] += x[j];
}
