// SPDX-License-Identifier: Apache-2.0
// Searches in a row of scores s_j - bias_j, and over its columns. NaN beats every number, and is beaten by none.

// The largest score; NaN if there is one.
template <typename T>
LEAF T largest(const T* s, const T* bias, i64 n) {
  T m = -std::numeric_limits<T>::infinity();
  int unordered = 0;
#pragma omp simd reduction(max : m) reduction(| : unordered)
  for (i64 j = 0; j < n; ++j) {
    const T x = s[j] - bias[j];
    m = x > m ? x : m;
    unordered |= x != x;
  }
  return unordered ? std::numeric_limits<T>::quiet_NaN() : m;
}

// Whether any of n scores, a constant where it can be, is `value` (NaN is NaN here).
template <typename T>
INLINE bool any_is(const T* s, const T* bias, i64 n, T value) {
  const bool unordered = value != value;
  int found = 0;
#pragma omp simd reduction(| : found)
  for (i64 j = 0; j < n; ++j) {
    const T x = s[j] - bias[j];
    found |= unordered ? x != x : x == value;
  }
  return found;
}

// Where `value` is first found; n if nowhere.
template <typename T>
LEAF i64 find(const T* s, const T* bias, i64 n, T value) {
  i64 j = 0;
  while (j + kWide <= n && !any_is(s + j, bias + j, kWide, value)) j += kWide;
  while (j + kGroup <= n && !any_is(s + j, bias + j, kGroup, value)) j += kGroup;
  while (j < n && !any_is(s + j, bias + j, 1, value)) ++j;
  return j;
}

template <typename T>
INLINE bool any_above(const T* s, const T* bias, i64 n, T threshold) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (i64 j = 0; j < n; ++j) found |= !(s[j] - bias[j] <= threshold);
  return found;
}

// The first group of kGroup, counted from `from`, with a score that is not at most `threshold`; n if none is left.
template <typename T>
LEAF i64 next_group(const T* s, const T* bias, i64 from, i64 n, T threshold) {
  i64 j = from;
  while (j + kWide <= n && !any_above(s + j, bias + j, kWide, threshold)) j += kWide;
  while (j + kGroup <= n && !any_above(s + j, bias + j, kGroup, threshold)) j += kGroup;
  return j + kGroup <= n || any_above(s + j, bias + j, n - j, threshold) ? j : n;
}

// best_j and index_j of each column: the largest s_ij - bias_i so far, and its row
template <typename T>
LEAF void best_of_columns(const T* s, i64 ld, i64 rows, i64 cols, const T* bias, int32_t first_row, T* best,
                          int32_t* index) {
  for (i64 i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    const T b = bias[i];
    const int32_t at = first_row + static_cast<int32_t>(i);
#pragma omp simd
    for (i64 j = 0; j < cols; ++j) {
      const T x = row[j] - b, old = best[j];
      const bool better = !(x <= old) & (old == old);
      best[j] = better ? x : old;
      index[j] = better ? at : index[j];
    }
  }
}

template <typename T>
LEAF T squared_distance(const T* a, const T* b, i64 n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) {
    const T d = a[j] - b[j];
    sum += d * d;
  }
  return sum;
}
