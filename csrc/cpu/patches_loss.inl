// SPDX-License-Identifier: Apache-2.0
// One patch of masked_patch_loss, in the first-level cache. Included once for each instruction set by multiversion.inl,
// after leaf.inl.

// sum of f(i), i in [0, n), in four sums side by side: one would wait for itself at every step
template <typename T, typename F>
INLINE T sum_of(i64 n, F f) {
  T a = 0, b = 0, c = 0, d = 0;
  const i64 part = n / 4;
#pragma omp simd reduction(+ : a, b, c, d)
  for (i64 i = 0; i < part; ++i) {
    a += f(i);
    b += f(i + part);
    c += f(i + 2 * part);
    d += f(i + 3 * part);
  }
  for (i64 i = 4 * part; i < n; ++i) a += f(i);
  return (a + b) + (c + d);
}

// t less its mean, by its unbiased deviation, in place; eps under the root or beside it. What is summed are differences
// from the first value, so that a constant patch gives zeros and a faint one keeps its digits.
template <typename T>
LEAF void standardize_values(T* t, i64 n, T eps, bool eps_beside) {
  const T first = t[0];
  const T mean = sum_of<T>(n, [=](i64 i) __attribute__((always_inline)) { return t[i] - first; }) / static_cast<T>(n);
  const T squares = sum_of<T>(n, [=](i64 i) __attribute__((always_inline)) {
    const T d = (t[i] - first) - mean;
    return d * d;
  });
  const T variance = squares / static_cast<T>(n - 1);
  const T factor = T(1) / (eps_beside ? std::sqrt(variance) + eps : std::sqrt(variance + eps));
#pragma omp simd
  for (i64 i = 0; i < n; ++i) t[i] = ((t[i] - first) - mean) * factor;
}

// sum of (pred - target)^2 or |pred - target|; grad, if not null, is slope times the difference or its sign
template <typename T>
LEAF T compare_values(const T* pred, const T* target, i64 n, bool l1, T slope, T* grad) {
  if (l1) {
    if (grad) {
#pragma omp simd
      for (i64 i = 0; i < n; ++i) {
        const T d = pred[i] - target[i];
        grad[i] = d > 0 ? slope : d < 0 ? -slope : T(0);
      }
    }
    return sum_of<T>(n, [=](i64 i) __attribute__((always_inline)) { return std::abs(pred[i] - target[i]); });
  }
  if (grad) {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) grad[i] = slope * (pred[i] - target[i]);
  }
  return sum_of<T>(n, [=](i64 i) __attribute__((always_inline)) {
    const T d = pred[i] - target[i];
    return d * d;
  });
}
