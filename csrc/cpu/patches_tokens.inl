// SPDX-License-Identifier: Apache-2.0
// Rows of tokens. Included once for each instruction set by multiversion.inl, after leaf.inl.

template <typename T>
LEAF void add_rows(const T* a, const T* b, T* out, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

// total += sum in double, and sum starts again: few float32 terms meet before they do in double
template <typename T>
LEAF void flush_row(T* sum, double* total, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    total[i] += static_cast<double>(sum[i]);
    sum[i] = T(0);
  }
}
