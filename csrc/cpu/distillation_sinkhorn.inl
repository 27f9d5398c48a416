// SPDX-License-Identifier: Apache-2.0
// Loops of Sinkhorn-Knopp over pieces of rows. Included once for each instruction set by multiversion.inl.

// highest_j = the largest of the scores so far, sum_j = sum of exp(scale (score - highest_j))
template <i64 count, typename T>
INLINE void add_rows(const T* x, i64 ld, i64 cols, T scale, T* highest, T* sum) {
#pragma omp simd
  for (i64 j = 0; j < cols; ++j) {
    T m = highest[j];
    for (i64 i = 0; i < count; ++i) m = x[i * ld + j] > m ? x[i * ld + j] : m;
    const T ref = m == -std::numeric_limits<T>::infinity() ? T(0) : m;  // -inf - -inf is not what comes next
    T s = sum[j] * exp_((highest[j] - ref) * scale);
    for (i64 i = 0; i < count; ++i) s += exp_((x[i * ld + j] - ref) * scale);
    highest[j] = m;
    sum[j] = s;
  }
}

template <typename T>
LEAF void column_sums(const T* x, i64 ld, i64 rows, i64 cols, T scale, T* highest, T* sum) {
  i64 i = 0;
  for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) add_rows<kRowsAtOnce>(x + i * ld, ld, cols, scale, highest, sum);
  for (; i < rows; ++i) add_rows<1>(x + i * ld, ld, cols, scale, highest, sum);
}

// exp of what a sum can hold: beyond, a sum shows that it needs a shift
template <typename T>
INLINE T bounded_exp(T x) {
  return exp_(x > T(80) ? T(80) : x);
}

// e_j = exp(scale (x_j - center_j - shift)); its sum
template <typename T>
LEAF T weigh(const T* x, const T* center, i64 n, T scale, T shift, T* e) {
  T s = 0;
#pragma omp simd reduction(+ : s)
  for (i64 j = 0; j < n; ++j) {
    e[j] = bounded_exp(((x[j] - center[j]) - shift) * scale);
    s += e[j];
  }
  return s;
}

// share_j += inverse e_j, the row before; then e_j as above for this row
template <typename T>
LEAF T share_and_weigh(const T* x, const T* center, i64 n, T scale, T* e, T inverse, T* share) {
  T s = 0;
#pragma omp simd reduction(+ : s)
  for (i64 j = 0; j < n; ++j) {
    share[j] += inverse * e[j];
    e[j] = bounded_exp((x[j] - center[j]) * scale);
    s += e[j];
  }
  return s;
}

template <typename T>
LEAF T largest(const T* x, const T* center, i64 n) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (i64 j = 0; j < n; ++j) {
    const T d = x[j] - center[j];
    m = d > m ? d : m;
  }
  return m;
}

// total += share, share = 0
template <typename T>
LEAF void fold(i64 n, T* share, double* total) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) {
    total[j] += share[j];
    share[j] = 0;
  }
}
