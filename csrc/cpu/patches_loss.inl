// SPDX-License-Identifier: Apache-2.0
// One patch of masked_patch_loss, in the first-level cache. Included once for each instruction set by multiversion.inl,
// after leaf.inl.

// t less its mean, by its unbiased deviation, in place; eps under the root or beside it. What is summed are differences
// from the first value, so that a constant patch gives zeros and a faint one keeps its digits.
template <typename T>
LEAF void standardize_values(T* t, i64 n, T eps, bool eps_beside) {
  const T first = t[0];
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < n; ++i) {
    t[i] -= first;
    sum += t[i];
  }
  const T mean = sum / static_cast<T>(n);
#pragma omp simd reduction(+ : squares)
  for (i64 i = 0; i < n; ++i) {
    t[i] -= mean;
    squares += t[i] * t[i];
  }
  const T variance = squares / static_cast<T>(n - 1);
  const T factor = T(1) / (eps_beside ? std::sqrt(variance) + eps : std::sqrt(variance + eps));
#pragma omp simd
  for (i64 i = 0; i < n; ++i) t[i] *= factor;
}

// sum of (pred - target)^2 or |pred - target|; grad, if not null, is slope times the difference or its sign
template <typename T>
LEAF T compare_values(const T* pred, const T* target, i64 n, bool l1, T slope, T* grad) {
  T sum = 0;
  if (l1) {
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; ++i) sum += std::abs(pred[i] - target[i]);
    if (grad) {
#pragma omp simd
      for (i64 i = 0; i < n; ++i) {
        const T d = pred[i] - target[i];
        grad[i] = d > 0 ? slope : d < 0 ? -slope : T(0);
      }
    }
  } else if (grad) {
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; ++i) {
      const T d = pred[i] - target[i];
      sum += d * d;
      grad[i] = slope * d;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; ++i) sum += (pred[i] - target[i]) * (pred[i] - target[i]);
  }
  return sum;
}
