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

// e = exp((x - ref) factor); the sum of those whose x is not ref itself
template <typename T>
LEAF T exponentials(const T* x, i64 n, T ref, T factor, T* e) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < n; ++j) {
    const T y = exp_((x[j] - ref) * factor);
    sum += x[j] == ref ? T(0) : y;
    e[j] = y;
  }
  return sum;
}

// the same, and dot = sum of p (ref - x)
template <typename T>
LEAF T compare(const T* x, const T* p, i64 n, T ref, T factor, T* e, T* dot) {
  T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (i64 j = 0; j < n; ++j) {
    const T d = x[j] - ref, y = exp_(d * factor);
    sum += x[j] == ref ? T(0) : y;
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
