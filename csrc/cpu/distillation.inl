// SPDX-License-Identifier: Apache-2.0
// Loops over one chunk of a row of logits. Included once for each instruction set.

// NaN is passed over here and shows in the sums
template <typename T>
LEAF T largest(const T* x, i64 n) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (i64 j = 0; j < n; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

// out = x - center, whose largest element is returned
template <typename T>
LEAF T shift(const T* x, const T* center, i64 n, T* out) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (i64 j = 0; j < n; ++j) {
    const T y = x[j] - center[j];
    out[j] = y;
    m = y > m ? y : m;
  }
  return m;
}

template <typename T>
LEAF i64 count_equal(const T* x, i64 n, T value) {
  i64 count = 0;
#pragma omp simd reduction(+ : count)
  for (i64 j = 0; j < n; ++j) count += x[j] == value;
  return count;
}

// where the first `value` is, n if nowhere
template <typename T>
LEAF i64 find(const T* x, i64 n, T value) {
  i64 at = n;
#pragma omp simd reduction(min : at)
  for (i64 j = 0; j < n; ++j) at = x[j] == value && j < at ? j : at;
  return at;
}

// 2^y, exactly 1 at y = 0, zero below 2^-101.5 (see exp_). Relative error below 1.5e-7. The polynomial is 2^25 too
// large and the power of two as much too small, so that it becomes zero while the product is far from the denormals.
INLINE float power(float x) {
  constexpr float kScale = 33554432.0f;
  const float y = x < -102.0f ? -102.0f : x;
  const float t = y + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(y)
  const float f = y - (t - 12582912.0f);
  float p = 1.535336191e-4f * kScale;
  p = p * f + 1.339887441e-3f * kScale;
  p = p * f + 9.618437358e-3f * kScale;
  p = p * f + 5.550332471e-2f * kScale;
  p = p * f + 2.402264791e-1f * kScale;
  p = p * f + 6.931472029e-1f * kScale;
  p = p * f + kScale;
  return p * bits<float>((bits<uint32_t>(t) - 0x4B400000u + 102u) << 23);
}

INLINE double power(double y) { return exp_(y * 0.693147180559945309); }

// e = 2^((x - ref) factor); their sum, with `ties` but of those where x is ref itself
template <bool ties, typename T>
LEAF T exponentials(const T* x, i64 n, T ref, T factor, T* e) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) {
    const T y = power((x[j] - ref) * factor);
    sum += ties && x[j] == ref ? T(0) : y;
    e[j] = y;
  }
  return sum;
}

// the same, and dot = sum of p (ref - x)
template <bool ties, typename T>
LEAF T compare(const T* x, const T* p, i64 n, T ref, T factor, T* e, T* dot) {
  T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (i64 j = 0; j < n; ++j) {
    const T d = x[j] - ref, y = power(d * factor);
    sum += ties && x[j] == ref ? T(0) : y;
    along -= p[j] * d;
    e[j] = y;
  }
  *dot = along;
  return sum;
}

// x *= factor; its sum
template <typename T>
LEAF T scale(T* x, i64 n, T factor) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) {
    x[j] *= factor;
    sum += x[j];
  }
  return sum;
}

template <typename T>
LEAF T total(const T* x, i64 n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) sum += x[j];
  return sum;
}

// out = x + y; its sum. out may be x
template <typename T>
LEAF T plus(const T* x, const T* y, i64 n, T* out) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) {
    const T z = x[j] + y[j];
    out[j] = z;
    sum += z;
  }
  return sum;
}

// out = a e - b p
template <typename T>
LEAF void slopes(const T* e, const T* p, i64 n, T a, T b, T* out) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) out[j] = a * e[j] - b * p[j];
}

// sum += x, and x is zero
template <typename T>
LEAF void move_to(double* sum, T* x, i64 n) {
#pragma omp simd
  for (i64 j = 0; j < n; ++j) {
    sum[j] += x[j];
    x[j] = 0;
  }
}
