// SPDX-License-Identifier: Apache-2.0
// Loops over the part of a row of logits that lies in one tile. Included once for each instruction set.

// sum (x - own)
template <typename T>
LEAF T sum_differences(const T* x, T own, i64 n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += x[j] - own;
  return sum;
}

// g = factor e - less
template <typename T>
LEAF void slopes(T* g, const T* e, i64 n, T factor, T less) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) g[j] = factor * e[j] - less;
}

// sum += x
template <typename T>
LEAF void add_to(double* sum, const T* x, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) sum[j] += x[j];
}

template <typename T>
LEAF double wide_dot(const T* a, const T* b, i64 n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += static_cast<double>(a[j]) * b[j];
  return sum;
}
